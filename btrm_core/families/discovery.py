"""Finding, loading and choosing model families.

Decides which plugin is used for a run, and says of each one that cannot be used which distribution and version it is
from and why. Families are found through the entry-point group `btrm.families` alone; those that come with btrm are
found the same way. Imports neither torch nor transformers, and of strangers only the family that a user chose: where
all are asked, strangers are asked in processes of their own (`probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import Any

from btrm_core.errors import FamilyError, did_you_mean, one_line, printable
from btrm_core.families import hookspecs, probe
from btrm_core.families.family import Family
from btrm_core.families.hookspecs import PROJECT
from btrm_core.families.installed import FamilyEntry, entry_of, family_points
from btrm_core.families.opening import check_metadata, open_family, summary


def discover() -> list[FamilyEntry]:
    """Every installed family by name, from entry-point metadata alone: nothing is imported."""
    points, unfit = family_points()
    return sorted([*map(entry_of, points), *unfit], key=lambda entry: (entry.name, entry.origin))


def list_families() -> list[FamilyEntry]:
    """Every installed family, each loaded in isolation: a broken one is listed with its cause and harms no other."""
    points, entries = family_points()
    strangers = []
    for point in points:
        entry = entry_of(point)
        try:
            check_metadata(point, points)
            if entry.distribution != PROJECT:
                strangers.append(entry)
                continue
            plugin, family = open_family(point.name, points)
            family.ask("recipe")
        except FamilyError as error:
            entries.append(dataclasses.replace(entry, status="broken", cause=one_line(error)))
        else:
            entries.append(dataclasses.replace(entry, summary=summary(plugin)))
    for entry, found in zip(strangers, probe.look_at([entry.name for entry in strangers]), strict=True):
        status = "ok" if found.cause is None else "broken"
        entries.append(dataclasses.replace(entry, status=status, cause=found.cause, summary=found.summary))
    return sorted(entries, key=lambda entry: (entry.name, entry.origin))


def load(name: str, settings: object | None = None, *, aside_first: bool = False) -> Family:
    """Load one family, and no other.

    Args:
        name: the family's name.
        settings: the run's `RunConfig` (or anything that `Overrides` takes), asked before the family.
        aside_first: import a stranger in a process of its own before, so that one that ends or hangs it is named.

    Raises:
        FamilyError: no such family, or it is broken; the exception that broke it is the `__cause__`.
    """
    points, unfit = family_points()
    entry = _named(name, points, unfit)
    try:
        check_metadata(next(point for point in points if point.name == name), points)
        if aside_first and (cause := deadly(entry)):
            raise FamilyError(cause)
        _, family = open_family(name, points, settings)
    except FamilyError as error:
        raise FamilyError(
            f"family '{name}' ({entry.origin}) is broken: {one_line(error)}. "
            f"Update, repair or uninstall {entry.distribution}"
        ) from (error.__cause__ or error)
    return family


def deadly(entry: FamilyEntry) -> str | None:
    """What a stranger does to the process that imports it, so that nobody can catch it: ends it, or keeps it waiting.

    Args:
        entry: the family; btrm's own are not looked at.
    """
    found = probe.look_at([entry.name] if entry.distribution != PROJECT else [])
    return next((one.cause for one in found if one.deadly), None)


def _named(name: str, points: Iterable[EntryPoint], unfit: Iterable[FamilyEntry]) -> FamilyEntry:
    """The entry of a family by its name; of one that cannot be a family, the error says why."""
    known = sorted({point.name for point in points})
    for point in points:
        if point.name == name:
            return entry_of(point)
    shown = printable(name)
    for entry in unfit:
        if entry.name == shown:
            raise FamilyError(f"{entry.distribution} {entry.version} is broken: {entry.cause}. Uninstall it")
    raise FamilyError(f"unknown family '{shown}'.{did_you_mean(shown, known)} Installed: {', '.join(known) or 'none'}")


def detect(config: Any, settings: object | None = None) -> Family:
    """The one installed family that claims a checkpoint with this transformers config.

    Families that are broken, or whose `claims` fails, are left out.

    Args:
        config: the checkpoint's transformers config.
        settings: the run's own answers to hooks; None for none.

    Raises:
        FamilyError: none claims it, or several do.
    """
    names = _names()
    claimants, silent = _claimants(names, config)
    if len(claimants) == 1:
        return load(claimants[0].name, settings)
    if claimants:
        listed = " and ".join(f"'{entry.name}' ({entry.origin})" for entry in claimants)
        raise FamilyError(
            f"families {listed} all claim this checkpoint ({_checkpoint(config)}); name one with --family"
        )
    broken = f" Broken, and so not asked: {', '.join(silent)}." if silent else ""
    raise FamilyError(
        f"no installed family claims this checkpoint ({_checkpoint(config)}). Installed: {', '.join(names) or 'none'}."
        f"{broken} Install a family for it, or write one: see CONTRIBUTING.md{_takers()}"
    )


def require_claim(family: Family, config: Any, *, force: bool = False) -> str | None:
    """Refuse a checkpoint that a named family is not made for; a family without the `claims` hook takes any.

    Args:
        family: the family that was named.
        config: the checkpoint's transformers config.
        force: take the checkpoint nevertheless.

    Returns:
        None, or a warning if the checkpoint was only taken because of `force`.

    Raises:
        FamilyError: says what the checkpoint is and which family claims it.
    """
    if "claims" not in family.hooks or family.claims(config):
        return None
    if force:
        return (
            f"family '{family.name}' ({family.origin}) does not claim this checkpoint ({_checkpoint(config)}) and was "
            "forced on it"
        )
    others, _ = _claimants((name for name in _names() if name != family.name), config)
    if others:
        advice = f"use --family {' or '.join(other.name for other in others)}"
    else:
        advice = f"no installed family claims it{_takers()}"
    raise FamilyError(
        f"family '{family.name}' ({family.origin}) is not made for this checkpoint ({_checkpoint(config)}): {advice}; "
        "--force-family uses it nevertheless"
    )


def _names() -> list[str]:
    return sorted({point.name for point in family_points()[0]})


def _claimants(names: Iterable[str], config: Any) -> tuple[list[FamilyEntry], list[str]]:
    """The families that claim the checkpoint, and the names of those that could not be asked."""
    points, _ = family_points()
    found, silent, strangers = [], [], []
    for name in names:
        point = next(point for point in points if point.name == name)
        entry = entry_of(point)
        try:
            check_metadata(point, points)
            if entry.distribution != PROJECT:
                strangers.append(entry)
                continue
            claimed = open_family(name, points)[1].claims(config)
        except FamilyError:
            silent.append(name)
        else:
            found += [entry] if claimed else []
    for entry, answer in zip(strangers, probe.look_at([entry.name for entry in strangers], config), strict=True):
        silent += [entry.name] if answer.cause is not None else []
        found += [entry] if answer.claims else []
    return sorted(found, key=lambda entry: entry.name), sorted(silent)


def _takers() -> str:
    """Say which of btrm's own families take any checkpoint, as the end of a message."""
    own = [entry.name for entry in discover() if entry.distribution == PROJECT]
    takers = [name for name in own if "claims" not in load(name).hooks]
    return f"; or try --family {' or '.join(takers)}, which takes any that passes its checks" if takers else ""


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
