"""Conformance: whether a family keeps the contract of its hooks; public as `btrm_core.testing`.

Imports nothing until a name is asked for: `python -m btrm_core.preflight.conformance.probe` measures what importing a
family costs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btrm_core.preflight.conformance.runner import (
        FamilyConformance,
        check_checkpoint,
        format_checks,
        run_checks,
    )

__all__ = ["FamilyConformance", "check_checkpoint", "format_checks", "run_checks"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("btrm_core.preflight.conformance.runner"), name)
    raise AttributeError(f"module 'btrm_core.preflight.conformance' has no attribute {name!r}")
