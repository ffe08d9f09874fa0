"""Families: who answers the six questions of a model family, and what an answer must be.

Importing this package loads pluggy and nothing heavier: whatever is more than the hooks themselves is loaded when it is
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from btrm_core.families import hookspecs
from btrm_core.families.hookspecs import ENTRY_POINT_GROUP, HOOKS, PROJECT, PadToken, TinyShape

if TYPE_CHECKING:
    from btrm_core.families.defaults import RECIPE
    from btrm_core.families.discovery import (
        deadly,
        detect,
        discover,
        list_families,
        load,
        require_claim,
    )
    from btrm_core.families.family import Answer, Family
    from btrm_core.families.installed import FamilyEntry, entry_of, family_points, unreadable_package
    from btrm_core.families.new_family import write_family
    from btrm_core.families.opening import import_plugin, strangers_here, summary
    from btrm_core.families.view import (
        describe,
        format_description,
        format_families,
        tracebacks,
    )

__all__ = [
    "ENTRY_POINT_GROUP",
    "HOOKS",
    "PROJECT",
    "RECIPE",
    "Answer",
    "Family",
    "FamilyEntry",
    "PadToken",
    "TinyShape",
    "deadly",
    "describe",
    "detect",
    "discover",
    "entry_of",
    "family_points",
    "format_description",
    "format_families",
    "hookspecs",
    "import_plugin",
    "list_families",
    "load",
    "require_claim",
    "strangers_here",
    "summary",
    "tracebacks",
    "unreadable_package",
    "write_family",
]

_HOMES = {
    "Answer": "family",
    "Family": "family",
    "FamilyEntry": "installed",
    "RECIPE": "defaults",
    "deadly": "discovery",
    "describe": "view",
    "detect": "discovery",
    "discover": "discovery",
    "format_description": "view",
    "format_families": "view",
    "list_families": "discovery",
    "entry_of": "installed",
    "family_points": "installed",
    "import_plugin": "opening",
    "load": "discovery",
    "write_family": "new_family",
    "require_claim": "discovery",
    "strangers_here": "opening",
    "summary": "opening",
    "tracebacks": "view",
    "unreadable_package": "installed",
}
"""Name -> the module of this package that holds it."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"btrm_core.families.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'btrm_core.families' has no attribute {name!r}")
