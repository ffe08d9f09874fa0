"""From an entry point to a plugin that may be asked: imported, and found to keep the form that the hooks need.

Decides which plugins are broken and what the cause is called, in a few words that others put into a sentence.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from importlib.metadata import EntryPoint, version

from btrm_core.errors import BtrmError, FamilyError, one_line, printable
from btrm_core.families.family import Family, assemble
from btrm_core.families.guard import guarded
from btrm_core.families.hookspecs import PROJECT
from btrm_core.families.installed import entry_of

strangers_here: set[str] = set()
"""Families of others whose code was run in this process, for messages about what nobody foresaw."""


def open_family(name: str, points: Sequence[EntryPoint], settings: object | None = None) -> tuple[object, Family]:
    """Import one plugin and check it against the contract; returns it and the family that asks it.

    Args:
        name: the family's name.
        points: all entry points that can be families, as `family_points` gives them.
        settings: the run's own settings, asked before the family.

    Raises:
        FamilyError: says the cause in a few words; the exception that the plugin raised is the `__cause__`.
    """
    point = next(point for point in points if point.name == name)
    origin = entry_of(point).origin
    check_metadata(point, points)
    plugin = import_plugin(point)
    if inspect.isclass(plugin):
        raise FamilyError(f"{point.value} is a class; the entry point must name a module or an instance")
    if entry_of(point).distribution != PROJECT:
        strangers_here.add(f"family '{name}' ({origin})")
    try:
        with guarded(f"family '{name}' ({origin})"):
            assemble(plugin, name)
            return plugin, Family(name, origin, plugin, settings)
    except BtrmError:
        raise
    except Exception as error:  # an object that fails at being looked at
        raise FamilyError(f"it fails when its hooks are looked for: {one_line(error)}") from error


def import_plugin(point: EntryPoint) -> object:
    """Import what an entry point names, whatever it is.

    Args:
        point: the entry point.

    Raises:
        FamilyError: says the cause in a few words; the exception that the plugin raised is the `__cause__`.
    """
    if EntryPoint.pattern.match(point.value) is None:
        raise FamilyError(f"its entry point names {printable(point.value)!r}; expected a module, or MODULE:INSTANCE")
    try:
        with guarded(f"the import of family '{point.name}' ({entry_of(point).origin})"):
            plugin: object = point.load()
    except Exception as error:
        raise FamilyError(one_line(error)) from (error.__cause__ if isinstance(error, FamilyError) else error)
    return plugin


def check_metadata(point: EntryPoint, points: Sequence[EntryPoint]) -> None:
    """Refuse, before anything is imported, a name that two offer, and a plugin that needs another btrm.

    Args:
        point: the entry point.
        points: all entry points of families.

    Raises:
        FamilyError: says which of the two it is.
    """
    same = [entry_of(other).origin for other in points if other.name == point.name]
    if len(same) > 1:
        raise FamilyError(f"its name is offered by {' and by '.join(same)}")
    _check_requirement(point)


def _check_requirement(point: EntryPoint) -> None:
    """Refuse a plugin whose own metadata asks for another btrm: pip checks that only when it installs the plugin."""
    if point.dist is None or entry_of(point).distribution == PROJECT:
        return
    from packaging.requirements import InvalidRequirement, Requirement

    needs: Sequence[str] = ()
    with contextlib.suppress(Exception):  # its metadata cannot be read: pip could not either
        needs = point.dist.requires or ()
    for text in needs:
        with contextlib.suppress(InvalidRequirement):
            needed = Requirement(text)
            applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
            here = version(PROJECT)
            if needed.name.lower() == PROJECT and applies and not needed.specifier.contains(here, prereleases=True):
                raise FamilyError(f"it needs {PROJECT}{needed.specifier}, but {PROJECT} {here} is installed")


def summary(plugin: object) -> str:
    """The first line of a plugin's docstring, of a long one the beginning.

    Args:
        plugin: what its entry point names.
    """
    line = ""
    with contextlib.suppress(Exception):  # it fails at being asked: then it has none
        line = printable((inspect.getdoc(plugin) or "").strip().partition("\n")[0])
    return line if len(line) <= 200 else f"{line[:197]}..."
