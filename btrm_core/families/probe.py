"""Strangers are looked at in a process of their own: `python -m btrm_core.families.probe NAME`.

Listing and detection ask every installed family, also those that nobody chose. Whatever such a plugin does when it is
imported or asked (end the process, hang, print, change the directory, replace functions of others), it does there. Each
is asked in its own process, all at once; nothing is remembered, so that what is said is true now.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from btrm_core.errors import FamilyError, one_line
from btrm_core.families.installed import family_points
from btrm_core.families.opening import open_family, summary

LIMIT_SECONDS = 60.0
"""How long a stranger may take; importing torch from a slow disk is within it."""
_MOST_PROCESSES = 8
_dumps = json.dumps  # as it is now: a plugin may put something else in its place
_STAGES = {"": "starting", "import": "importing it", "recipe": "its hook recipe", "claims": "its hook claims"}


@dataclass(frozen=True)
class Finding:
    """What became of one stranger.

    Attributes:
        cause: why it is broken, on one line; None if it is not.
        summary: the first line of the plugin's docstring.
        claims: whether it claims the checkpoint that it was asked about.
        deadly: whether it ended the process, or kept it waiting, so that nobody can catch it.
    """

    cause: str | None = None
    summary: str = ""
    claims: bool = False
    deadly: bool = False


def look_at(names: Sequence[str], config: Any = None) -> list[Finding]:
    """Import each family and ask its recipe, or, given a checkpoint's config, whether it claims it.

    Args:
        names: of families that are no part of btrm, each of one distribution.
        config: a transformers config, or None.
    """
    request = b"" if config is None else _packed(config)
    with ThreadPoolExecutor(min(_MOST_PROCESSES, len(names)) or 1) as pool:
        return list(pool.map(lambda name: _look(name, request), names))


def _look(name: str, request: bytes) -> Finding:
    # The same paths as here, also those that this process was given later.
    paths = os.pathsep.join(dict.fromkeys(path for path in sys.path if path))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "btrm_core.families.probe", name]
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, env=environment, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        stage = _STAGES[_last(error.stdout)[0]]
        return Finding(f"{stage} takes longer than {LIMIT_SECONDS:g} seconds", deadly=True)
    stage, answer = _last(done.stdout)
    if answer is not None:
        return Finding(**answer)
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return Finding(f"{_STAGES[stage]} ends the process ({how})", deadly=True)


def _last(output: bytes | None) -> tuple[str, dict[str, Any] | None]:
    """The last stage that was begun, and the answer if there is one."""
    stage = ""
    for line in (output or b"").decode("utf-8", "replace").splitlines():
        if line in _STAGES:
            stage = line
        elif line.startswith("{"):
            return stage, json.loads(line)
    return stage, None


def _packed(config: Any) -> bytes:
    """A config as bytes: its values, which are read quickly, and itself, for plugins that need the real thing."""
    try:
        whole = pickle.dumps(config)
    except Exception:  # a class made on the fly, say
        whole = b""
    try:
        values = dict(config.to_dict())
        aliases = dict(getattr(type(config), "attribute_map", {}))
    except Exception:  # no transformers config
        return pickle.dumps((None, None, whole))
    return pickle.dumps((json.dumps(values, default=str), aliases, whole))


class _Values(SimpleNamespace):
    """The values of a config with its attributes, without transformers, whose import takes seconds."""

    def __init__(self, values: dict[str, Any], aliases: dict[str, str]) -> None:
        parts = {
            key: _Values(value, {}) if key.endswith("_config") and isinstance(value, dict) else value
            for key, value in values.items()
        }
        super().__init__(**parts)
        for alias, name in aliases.items():
            if name in parts:
                setattr(self, alias, parts[name])
        self._values = values

    def to_dict(self) -> dict[str, Any]:
        """The values."""
        return dict(self._values)

    def get_text_config(self, **_: Any) -> Any:
        """The part that describes the language model."""
        return getattr(self, "text_config", None) or self


def _claims(family: Any, request: bytes) -> bool:
    """Ask with the plain values first; with the whole config if the plugin wants more than these have."""
    text, aliases, whole = pickle.loads(request)
    if text is not None:
        try:
            claimed = family.claims(_Values(json.loads(text), aliases))
        except FamilyError:
            if not whole:
                raise
        else:
            if not whole or "transformers" not in sys.modules:
                return bool(claimed)
    return bool(family.claims(pickle.loads(whole)))


def _answer(name: str, out: Any) -> Finding:
    """Look at one family; says on `out` what it is about to do."""
    request = sys.stdin.buffer.read()
    try:
        print("import", file=out, flush=True)
        plugin, family = open_family(name, family_points()[0])
        if request:
            print("claims", file=out, flush=True)
            return Finding(claims=_claims(family, request))
        print("recipe", file=out, flush=True)
        family.ask("recipe")  # the one hook that can be asked without a tokenizer
        return Finding(summary=summary(plugin))
    except Exception as error:
        return Finding(cause=one_line(error))


def main(name: str) -> None:
    """Answer on the true standard output, which the plugin does not get to see.

    Args:
        name: the family's name.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        found = _answer(name, out)
        print(_dumps(vars(found)), file=out, flush=True)
        os._exit(0)  # without waiting for threads that the plugin started


if __name__ == "__main__":
    main(sys.argv[1])
