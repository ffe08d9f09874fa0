"""The entry points of the group `btrm.families`, read from the metadata of whatever is installed.

Decides which entry points can be families at all. Metadata is written by strangers: one package whose files cannot be
read, or a name that is no name, is said of that package and harms nobody else.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from weakref import WeakKeyDictionary

from btrm_core.errors import printable
from btrm_core.families.hookspecs import ENTRY_POINT_GROUP

_DESCRIBED: WeakKeyDictionary[Distribution, tuple[str, str]] = WeakKeyDictionary()
"""Name and version by distribution: metadata holds a whole README, and a package offers several families."""
_NAME = re.compile(r"\w[\w.-]{0,63}(?<!\.)")


@dataclass(frozen=True)
class FamilyEntry:
    """One entry point of the group, as `btrm families` lists it."""

    name: str
    value: str
    """What the entry point names: a module, or `module:instance`."""
    distribution: str
    version: str
    status: str = "ok"
    """Either "ok" or "broken"; `discover` loads nothing and says "ok" of all but those whose metadata is unfit."""
    cause: str | None = None
    """Why it is broken, on one line."""
    summary: str = ""
    """The first line of the plugin's docstring."""

    @property
    def origin(self) -> str:
        """Distribution and version, e.g. "btrm 0.1.0"."""
        return f"{self.distribution} {self.version}"


def family_points() -> tuple[list[EntryPoint], list[FamilyEntry]]:
    """Read all metadata.

    Returns:
        The entry points that can be families, by name and origin; and those that cannot, with the cause.
    """
    points: list[EntryPoint] = []
    unfit: list[FamilyEntry] = []
    seen: set[str] = set()
    for found in distributions():
        name = _folder_name(found)
        if name in seen or name.startswith("~"):  # the first on the path wins; pip leaves "~" when it is interrupted
            continue
        seen.add(name)
        try:
            own = [point for point in found.entry_points if point.group == ENTRY_POINT_GROUP]
        except Exception as error:  # no text, or no entry points: any package may bring anything
            unfit += _unreadable(found, error)
            continue
        for point in own:
            cause = _unfit_name(point.name)
            entry = entry_of(point)
            if cause is None:
                points.append(point)
            else:
                unfit.append(FamilyEntry(entry.name, entry.value, entry.distribution, entry.version, "broken", cause))
    return sorted(points, key=lambda point: (point.name, entry_of(point).origin)), unfit


def entry_of(point: EntryPoint) -> FamilyEntry:
    """What an entry point's metadata says, fit to be printed.

    Args:
        point: the entry point.
    """
    distribution, version = _described(point.dist)
    return FamilyEntry(printable(point.name), printable(point.value), distribution, version)


def unreadable_package() -> str | None:
    """Say so if an installed package has entry points that are no text: torch and others fail on it at import."""
    for found in distributions():
        try:
            _ = found.entry_points
        except UnicodeError:
            name, version = _described(found)
            return (
                f"the entry_points.txt of the installed package {name} {version} is not UTF-8, and torch and other "
                f"libraries cannot be imported beside it; repair or uninstall {name}"
            )
        except Exception:  # something else is wrong with it, which is no reason for the error at hand
            continue
    return None


def _described(found: Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution, whose own metadata may be missing or damaged."""
    if found is None:
        return "unknown", "unknown"
    if found not in _DESCRIBED:
        name = version = None
        with contextlib.suppress(Exception):
            name, version = found.metadata["Name"], found.metadata["Version"]
        if name is None:
            name = _folder_name(found)
        _DESCRIBED[found] = printable(name or "unknown"), printable(version or "unknown")
    return _DESCRIBED[found]


def _folder_name(found: Distribution) -> str:
    """The distribution's name as its metadata folder gives it, without opening a file."""
    path = getattr(found, "_path", None)
    if path is None:
        with contextlib.suppress(Exception):
            return str(found.metadata["Name"])
        return "unknown"
    stem = Path(str(path)).stem
    return re.sub(r"[-_.]+", "-", stem.partition("-")[0] or stem).lower()


def _unfit_name(name: str) -> str | None:
    """Say why a name cannot be a family's: it is typed after `--family`, and names folders of runs and caches."""
    if _NAME.fullmatch(name) is not None:
        return None
    shown = printable(name)
    if len(name) > 64:
        shown = f"{shown[:24]}..."
    return (
        f"its name '{shown}' cannot be a family's; expected at most 64 letters, digits, '_', '-' and '.', beginning "
        "with a letter, a digit or '_'"
    )


def _unreadable(found: Distribution, error: Exception) -> list[FamilyEntry]:
    """An entry for a package whose entry points cannot be read, if they seem to be of this group."""
    try:
        path = Path(str(getattr(found, "_path", ""))) / "entry_points.txt"
        ours = ENTRY_POINT_GROUP.encode() in path.read_bytes()
    except OSError:
        ours = False
    if not ours:
        return []
    distribution, version = _described(found)
    why = "it is not UTF-8" if isinstance(error, UnicodeError) else printable(str(error).splitlines()[0])
    cause = f"its entry_points.txt cannot be read ({why})"
    return [FamilyEntry("?", "", distribution, version, "broken", cause)]
