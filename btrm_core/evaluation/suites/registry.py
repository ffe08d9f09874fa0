"""Which suites there are: those of btrm, and those of installed packages (entry-point group `btrm.suites`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from btrm_core.errors import BtrmError, ConfigError, did_you_mean, one_line
from btrm_core.evaluation.suites.base import Suite

GROUP = "btrm.suites"
_OWN = ("rewardbench", "rewardbench2", "rm-bench", "judgebench", "llmbar", "ppe")
_PARTS = ("NAME", "SOURCES", "items", "score", "results")


def suite_names() -> list[str]:
    """Names that `load_suite` knows; nothing is imported."""
    return [*_OWN, *sorted(set(_others()) - set(_OWN))]


def load_suite(name: str) -> Suite:
    """Import a suite by its name.

    Args:
        name: btrm's own, or that of an entry point in the group `btrm.suites`.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    if name in _OWN:
        return cast(Suite, import_module(f"btrm_core.evaluation.suites.{name.replace('-', '_')}"))
    known = _others()
    if name not in known:
        names = suite_names()
        raise ConfigError(f"there is no suite '{name}'; expected {', '.join(names)}.{did_you_mean(name, names)}")
    origin = f"suite '{name}' ({known[name].value})"
    try:
        suite = known[name].load()
    except Exception as error:  # whatever a stranger's module raises
        raise ConfigError(f"{origin} cannot be imported: {type(error).__name__}: {error}") from error
    missing = [part for part in _PARTS if not hasattr(suite, part)]
    if missing:
        raise ConfigError(f"{origin} has no {', '.join(missing)}; a suite has {', '.join(_PARTS)}")
    return cast(Suite, _Guarded(suite, origin))


class _Guarded:
    """A stranger's suite: whatever it raises names it.

    Args:
        suite: the module.
        origin: what it is called, and where it is.
    """

    def __init__(self, suite: Any, origin: str) -> None:
        self.NAME = suite.NAME
        self.SOURCES = [suite.SOURCES] if isinstance(suite.SOURCES, str) else list(suite.SOURCES)
        self._suite, self._origin = suite, origin

    def __getattr__(self, part: str) -> Callable[..., Any]:
        call = getattr(self._suite, part)

        def guarded(*arguments: Any) -> Any:
            try:
                found = call(*arguments)
                return list(found) if isinstance(found, Iterator) else found  # a generator fails here or nowhere
            except BtrmError:
                raise
            except Exception as error:
                raise ConfigError(f"{self._origin} fails in {part}(): {one_line(error)}; ask its author") from error

        return guarded


def _others() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
