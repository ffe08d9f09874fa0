"""What the author of a family tests it with: one class of about two dozen checks.

    from btrm_core.testing import FamilyConformance


    class TestFoo(FamilyConformance):
        family = "foo"

Run by pytest, each check is a test; its docstring says what it proves, and its failure says what is wrong, why that
matters and what to do. Everything is made in memory from the tiny shape in the family's recipe: no download, a few
seconds. The same checks run as `pytest --btrm-family=foo` and as `btrm families foo --check [--model M]`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from btrm_core.console import LongWork, quiet_libraries
from btrm_core.errors import one_line
from btrm_core.preflight import Check
from btrm_core.preflight.conformance.contract import ContractChecks
from btrm_core.preflight.conformance.model import ModelChecks
from btrm_core.preflight.conformance.subject import Subject
from btrm_core.preflight.conformance.text import TextChecks
from btrm_core.preflight.conformance.verdict import Missing, NotConforming


class FamilyConformance(ModelChecks, TextChecks, ContractChecks):
    """The contract of a family as tests. Subclass it with a name that pytest collects, and name the family.

    What is given besides the name replaces what the recipe's tiny shape says: give it where the recipe has no tiny
    shape, or to check the family with a real tokenizer or the values of a real config.
    """

    family: ClassVar[str] = ""
    """The family's name, as its entry point gives it."""
    special_tokens: ClassVar[Mapping[str, str] | None] = None
    """bos_token, eos_token, unk_token, pad_token of a tokenizer made in memory."""
    control_tokens: ClassVar[tuple[str, ...] | None] = None
    """Further control tokens of a tokenizer made in memory."""
    tokenizer: ClassVar[str | Path | None] = None
    """Directory of a tokenizer to use instead."""
    model: ClassVar[Mapping[str, object] | str | Path | None] = None
    """Config values of a tiny model, `model_type` among them; or a checkpoint of which a small copy is made."""

    @property
    def subject(self) -> Subject:  # type: ignore[override]
        """What the checks look at: made once for a class, so that its tests share tokenizer and model."""
        cls = type(self)
        if "_subject" not in vars(cls):
            cls._subject = Subject(  # type: ignore[attr-defined]
                cls.family,
                special_tokens=cls.special_tokens,
                control_tokens=cls.control_tokens,
                tokenizer=cls.tokenizer,
                model=cls.model,
            )
        return cast(Subject, cls._subject)  # type: ignore[attr-defined]

    @classmethod
    def teardown_class(cls) -> None:
        """Remove what the checks wrote; pytest calls it after the last test of the class."""
        if "_subject" in vars(cls):
            cls._subject.close()  # type: ignore[attr-defined]
            del cls._subject  # type: ignore[attr-defined]


def run_checks(name: str, model: str | None = None) -> list[Check]:
    """Run every check on an installed family, without a test framework.

    Args:
        name: the family's name.
        model: hub id or directory of a checkpoint whose config and tokenizer are used; its weights are not.

    Returns:
        One result per check, in the order in which they build on each other. Never raises for a family.
    """

    class Checked(FamilyConformance):
        pass

    Checked.family, Checked.model = name, model
    try:
        with quiet_libraries(stdout=sys.stderr):  # what is printed is no result
            return [_run(Checked(), check) for check in _checks()]
    finally:
        Checked.teardown_class()


def check_checkpoint(name: str, tokenizer: Any, config: Any) -> list[Check]:
    """Run the checks of text and model on one checkpoint, for a family that takes any.

    Args:
        name: the family's name.
        tokenizer: the checkpoint's, as it was loaded; it stays as it is.
        config: the checkpoint's transformers config.

    Returns:
        The results up to the first failure. Never raises for a checkpoint.
    """

    class Checked(FamilyConformance):
        pass

    Checked._subject = Subject(name, loaded=(tokenizer, config))  # type: ignore[attr-defined]
    contract = {check for check in vars(ContractChecks) if check.startswith("test_")}
    results: list[Check] = []
    try:
        with quiet_libraries(stdout=sys.stderr):
            for check in _checks():
                if check not in contract and (not results or results[-1].verdict != "fail"):
                    results.append(_run(Checked(), check))
    finally:
        Checked.teardown_class()
    return results


def format_checks(results: Sequence[Check]) -> str:
    """The results as a report for the terminal: one line per check, and the reasons under what did not pass.

    Args:
        results: from `run_checks`.

    Returns:
        Lines; the last says how many checks ended how.
    """
    lines = []
    for result in results:
        word = "PASS" if result.verdict == "ok" else result.verdict.upper()
        lines.append(f"{word:<4}  {result.name}" + ("" if result.verdict == "ok" else f": {result.what}"))
        if result.verdict == "fail":
            lines += [f"      why it matters: {result.why}", f"      what to do: {result.what_to_do}"]
    counts = [f"{sum(r.verdict == verdict for r in results)} {word}" for verdict, word in _WORDS.items()]
    return "\n".join([*lines, "", ", ".join(counts)])


_WORDS = {"ok": "passed", "fail": "failed", "skip": "skipped"}


def _checks() -> list[str]:
    """The names of the checks, those of the base classes in the order in which pytest runs them."""
    return [name for base in reversed(FamilyConformance.__mro__) for name in vars(base) if name.startswith("test_")]


def _run(checks: FamilyConformance, name: str) -> Check:
    check = getattr(checks, name)
    title = name.removeprefix("test_").replace("_", " ")
    proves = " ".join((inspect.getdoc(check) or "").split())
    try:
        with LongWork(f"checking: {title}"):
            check()
    except NotConforming as error:
        return Check(title, "fail", error.what, error.why, error.what_to_do)
    except Missing as reason:
        return Check(title, "skip", str(reason))
    except Exception as error:  # an error nobody foresaw is a failure of the family until it is understood
        return Check(title, "fail", one_line(error), "a run would meet it too", "look at the family's hooks first")
    return Check(title, "ok", proves)
