"""Checks of the plugin as code: how it is found, which hooks it has, what importing it does, how steady it answers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from btrm_core.errors import FamilyError, did_you_mean
from btrm_core.families import ENTRY_POINT_GROUP, HOOKS, PROJECT, hookspecs, load
from btrm_core.preflight.conformance.probe import answers
from btrm_core.preflight.conformance.subject import Subject
from btrm_core.preflight.conformance.verdict import NotConforming, require

_MARK = f"{PROJECT}_impl"


_PROBE_SECONDS = 120


class ContractChecks:
    """What can be said of a family without looking at a tokenizer's ids."""

    subject: Subject

    def test_entry_point_resolves(self) -> None:
        """`btrm train --family NAME` finds the plugin, in one distribution only, and can load it."""
        name, installed = self.subject.name, bool(self.subject.points)
        try:
            load(name, aside_first=True)
        except FamilyError as error:
            raise NotConforming(
                str(error),
                "families are found through entry points alone, and a run that names one that cannot be loaded stops",
                "put right what the message says"
                if installed
                else f'add [project.entry-points."{ENTRY_POINT_GROUP}"] {name} = "YOUR_PACKAGE" to pyproject.toml and '
                "install the package (pip install -e .)",
            ) from error

    def test_plugin_is_no_class(self) -> None:
        """The entry point names a module or an instance, whose hooks can be called without arguments of their own."""
        require(
            not inspect.isclass(self.subject.plugin),
            f"the entry point '{self.subject.points[0].value}' names a class",
            "its hooks would be called without an instance",
            "name the module, or an instance of the class",
        )

    def test_only_known_hooks(self) -> None:
        """Every function marked @hookimpl is one of btrm's hooks, and takes arguments that btrm gives."""
        known = {name: set(inspect.signature(getattr(hookspecs, name)).parameters) for name in HOOKS}
        found = dict(_marked(self.subject.plugin))
        require(
            found,
            "no function is marked @hookimpl",
            "a family without hooks changes nothing",
            f"write at least one of {', '.join(HOOKS)}",
        )
        for name, function in found.items():
            require(
                name in known,
                f"'{name}' is marked @hookimpl but is no hook",
                "btrm would never ask it",
                f"use one of {', '.join(HOOKS)}.{did_you_mean(name, HOOKS)}",
            )
            for argument in inspect.signature(function).parameters.values():
                require(
                    argument.name in known[name]
                    and argument.default is argument.empty
                    and argument.kind is argument.POSITIONAL_OR_KEYWORD,
                    f"hook {name} takes '{argument}'",
                    "btrm gives the arguments of the specification by name; whether a default would be used depends on "
                    "the version of pluggy",
                    f"take some of ({', '.join(sorted(known[name]))}), without defaults, * or **",
                )

    def test_no_unmarked_hooks(self) -> None:
        """No function has the name of a hook without being marked, and would be ignored without a word."""
        marked = dict(_marked(self.subject.plugin))
        for name in HOOKS:
            require(
                name in marked or not callable(getattr(self.subject.plugin, name, None)),
                f"function '{name}' has the name of a hook but is not marked",
                "btrm would use its default instead and say nothing",
                "put @hookimpl (from btrm_core import hookimpl) above it, or rename it",
            )

    def test_says_what_it_is(self) -> None:
        """The plugin's docstring begins with one line that `btrm families` can show."""
        text = (inspect.getdoc(self.subject.plugin) or "").strip()
        line = text.partition("\n")[0]
        require(
            line and len(line) <= 120,
            f"the plugin's docstring begins with {line!r}" if line else "the plugin has no docstring",
            "`btrm families` shows its first line, and users choose by it",
            "write a docstring whose first line names the models, in at most 120 characters",
        )

    def test_import_is_light(self) -> None:
        """Importing the plugin loads no torch, opens no socket, starts no process, and touches no file of others."""
        _ = self.subject.plugin
        found = _run_probe(["import", self.subject.name])
        require(
            not found["modules"],
            f"importing the plugin imports {', '.join(found['modules'])}",
            "`btrm families` imports every installed family and must answer at once",
            "import them inside the functions that need them, and for annotations under `if TYPE_CHECKING`",
        )
        require(
            not found["events"],
            f"importing the plugin does this: {'; '.join(found['events'][:3])}",
            "it happens on every machine where the plugin is installed, whether or not it is used",
            "do it inside the hook that needs it, and read only files of your own package",
        )

    def test_answers_are_steady(self) -> None:
        """Asked twice, and in another process with another hash seed and directory, the hooks answer the same."""
        subject = self.subject
        try:
            here = answers(subject.family, subject.config, subject.fresh_tokenizer())
            again = answers(subject.family, subject.config, subject.fresh_tokenizer())
        except FamilyError as error:
            raise NotConforming(
                str(error),
                "a run that uses this family stops there",
                "put right what the message says; each answer is described in btrm_core.families.hookspecs",
            ) from error
        _require_same(here, again, "when asked a second time")
        probe = ["answers", subject.name, subject.checkpoint, subject.source]
        _require_same(here, _run_probe(probe, cwd=str(subject.directory)), "in another process")


def _require_same(here: dict[str, Any], other: dict[str, Any], where: str) -> None:
    for hook in here:
        require(
            here[hook] == other[hook],
            f"hook {hook} answers differently {where}: {here[hook]!r:.80} and {other[hook]!r:.80}",
            "every process of a run asks for itself; if their answers differ, they train different models",
            "let the answer depend on the arguments alone: no clock, no random numbers, no order of a set, no path "
            "relative to the current directory",
        )


def _marked(plugin: object) -> Iterator[tuple[str, Any]]:
    """The functions of a plugin that carry btrm's mark, by name."""
    for name in dir(plugin):
        value = getattr(plugin, name, None)
        if inspect.isroutine(value) and getattr(value, _MARK, None) is not None:
            yield name, value


def _run_probe(arguments: list[str], cwd: str | None = None) -> dict[str, Any]:
    """Run `probe` in a fresh process and return what it found."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "btrm_core.preflight.conformance.probe", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise NotConforming(
            f"the plugin did not answer within {_PROBE_SECONDS} seconds in a process of its own",
            "every start of btrm waits for it",
            "look for a download or an endless loop in the plugin",
        ) from error
    if done.returncode:
        raise NotConforming(
            f"the plugin fails in another process, started in another directory: {_last(done.stderr)}",
            "runs start several processes, from any directory",
            "read files relative to the plugin (Path(__file__)), and install the package instead of finding it on "
            "the path",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
