"""Finding, loading and choosing model families.

Decides which plugin is used for a run, and says of each one that cannot be used which distribution and version it is
from and why. Families are found through the entry-point group `btrm.families` alone; those that come with btrm are
found the same way. Imports neither torch nor transformers, and only the families that are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

from btrm_core.errors import FamilyError, did_you_mean, one_line
from btrm_core.families import hookspecs
from btrm_core.families.family import Family, assemble
from btrm_core.families.hookspecs import ENTRY_POINT_GROUP, PROJECT


@dataclass(frozen=True)
class FamilyEntry:
    """One entry point of the group, as `btrm families` lists it."""

    name: str
    value: str
    """What the entry point names: a module, or `module:instance`."""
    distribution: str
    version: str
    status: str = "ok"
    """Either "ok" or "broken"; `discover` loads nothing and says "ok" of all."""
    cause: str | None = None
    """Why it is broken, on one line."""
    summary: str = ""
    """The first line of the plugin's docstring."""

    @property
    def origin(self) -> str:
        """Distribution and version, e.g. "btrm 0.1.0"."""
        return f"{self.distribution} {self.version}"


def discover() -> list[FamilyEntry]:
    """Every installed family by name, from entry-point metadata alone: nothing is imported."""
    return [_entry(point) for point in _points()]


def list_families() -> list[FamilyEntry]:
    """Every installed family, each loaded in isolation: a broken one is listed with its cause and harms no other."""
    points = _points()
    entries = []
    for point in points:
        try:
            plugin = _open(point, points)
            Family(point.name, _entry(point).origin, plugin).ask(
                "recipe"
            )  # the one hook that can be asked without a tokenizer
        except FamilyError as error:
            entries.append(dataclasses.replace(_entry(point), status="broken", cause=one_line(error)))
        else:
            entries.append(dataclasses.replace(_entry(point), summary=summary(plugin)))
    return entries


def load(name: str, settings: object | None = None) -> Family:
    """Load one family, and no other.

    Args:
        name: the family's name.
        settings: the run's `RunConfig` (or anything that `Overrides` takes), asked before the family.

    Raises:
        FamilyError: no such family, or it is broken; the exception that broke it is the `__cause__`.
    """
    points = _points()
    known = _names()
    if name not in known:
        raise FamilyError(
            f"unknown family '{name}'.{did_you_mean(name, known)} Installed: {', '.join(known) or 'none'}"
        )
    point = next(point for point in points if point.name == name)
    entry = _entry(point)
    try:
        plugin = _open(point, points)
    except FamilyError as error:
        raise FamilyError(
            f"family '{name}' ({entry.origin}) is broken: {one_line(error)}. "
            f"Update, repair or uninstall {entry.distribution}"
        ) from (error.__cause__ or error)
    return Family(name, entry.origin, plugin, settings)


def detect(config: Any, settings: object | None = None) -> Family:
    """The one installed family that claims a checkpoint with this transformers config.

    Families that are broken, or whose `claims` fails, are left out.

    Raises:
        FamilyError: none claims it, or several do.
    """
    names = _names()
    claimants, silent = _claimants(names, config)
    if len(claimants) == 1:
        return Family(claimants[0].name, claimants[0].origin, claimants[0].plugin, settings)
    if claimants:
        listed = " and ".join(f"'{family.name}' ({family.origin})" for family in claimants)
        raise FamilyError(
            f"families {listed} all claim this checkpoint ({_checkpoint(config)}); name one with --family"
        )
    broken = f" Broken, and so not asked: {', '.join(silent)}." if silent else ""
    raise FamilyError(
        f"no installed family claims this checkpoint ({_checkpoint(config)}). Installed: {', '.join(names) or 'none'}."
        f"{broken} Install a family for it, or write one: see CONTRIBUTING.md"
    )


def require_claim(family: Family, config: Any) -> None:
    """Refuse a checkpoint that a named family is not made for; a family without the `claims` hook takes any.

    Raises:
        FamilyError: says what the checkpoint is and which family claims it.
    """
    if "claims" not in family.hooks or family.claims(config):
        return
    others, _ = _claimants((name for name in _names() if name != family.name), config)
    advice = (
        f"use --family {' or '.join(other.name for other in others)}" if others else "no installed family claims it"
    )
    raise FamilyError(
        f"family '{family.name}' ({family.origin}) is not made for this checkpoint ({_checkpoint(config)}): {advice}"
    )


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, _entry(point).origin))


def _names() -> list[str]:
    return sorted({point.name for point in _points()})


def _entry(point: EntryPoint) -> FamilyEntry:
    found = point.dist
    name, number = (found.metadata["Name"], found.version) if found is not None else (None, None)
    return FamilyEntry(point.name, point.value, name or "unknown", number or "unknown")


def _open(point: EntryPoint, points: Iterable[EntryPoint]) -> object:
    """Import one plugin and check it against the contract; every failure becomes a FamilyError that says the cause."""
    same = [_entry(other).origin for other in points if other.name == point.name]
    if len(same) > 1:
        raise FamilyError(f"its name is offered by {' and by '.join(same)}")
    _check_requirement(point)
    try:
        # What a plugin prints while it is imported must not end up in output that a program reads.
        with contextlib.redirect_stdout(sys.stderr):
            plugin: object = point.load()
    except (Exception, SystemExit) as error:
        raise FamilyError(one_line(error)) from error
    if inspect.isclass(plugin):
        raise FamilyError(f"{point.value} is a class; the entry point must name a module or an instance")
    assemble(plugin, point.name)
    return plugin


def _check_requirement(point: EntryPoint) -> None:
    """Refuse a plugin whose own metadata asks for another btrm: pip checks that only when it installs the plugin."""
    if point.dist is None or _entry(point).distribution == PROJECT:
        return
    from packaging.requirements import InvalidRequirement, Requirement

    for text in point.dist.requires or ():
        with contextlib.suppress(InvalidRequirement):
            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            here = version(PROJECT)
            if needed.name.lower() == PROJECT and applies and not needed.specifier.contains(here, prereleases=True):
                raise FamilyError(f"it needs {PROJECT}{needed.specifier}, but {PROJECT} {here} is installed")


def _claimants(names: Iterable[str], config: Any) -> tuple[list[Family], list[str]]:
    """The families that claim the checkpoint, and the names of those that could not be asked."""
    found, silent = [], []
    for name in names:
        try:
            family = load(name)
            claimed = family.claims(config)
        except FamilyError:
            silent.append(name)
        else:
            found += [family] if claimed else []
    return found, silent


def _checkpoint(config: Any) -> str:
    """What a checkpoint is, in the words of its config."""
    facts = [f"model_type {getattr(config, 'model_type', None)!r}"]
    if architectures := getattr(config, "architectures", None):
        facts.append(f"architectures {', '.join(architectures)}")
    if (size := getattr(hookspecs.text_config(config), "vocab_size", None)) is not None:
        facts.append(f"vocab_size {size}")
    if (theta := hookspecs.rope_theta(config)) is not None:
        facts.append(f"rope_theta {theta:g}")
    return ", ".join(facts)


def summary(plugin: object) -> str:
    """The first line of a plugin's docstring."""
    return (inspect.getdoc(plugin) or "").strip().partition("\n")[0]
