"""What the author of a family tests it with: one class of about two dozen checks.

    from btrm_core.testing import FamilyConformance


    class TestFoo(FamilyConformance):
        family = "foo"

Run by pytest, each check is a test; its docstring says what it proves, and its failure says what is wrong, why that
matters and what to do. Everything is made in memory from the tiny shape in the family's recipe: no download, a few
seconds. The same checks run as `pytest --btrm-family=foo` and as `btrm families foo --check [--model M]`.
"""

from __future__ import annotations

from btrm_core.preflight import Check
from btrm_core.preflight.conformance.runner import (
    FamilyConformance,
    check_checkpoint,
    format_checks,
    run_checks,
)

__all__ = ["Check", "FamilyConformance", "check_checkpoint", "format_checks", "run_checks"]
