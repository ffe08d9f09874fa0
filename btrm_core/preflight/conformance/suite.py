"""The suite that `pytest --btrm-family=NAME` runs."""

from __future__ import annotations

from btrm_core.preflight.conformance.runner import FamilyConformance


class TestFamily(FamilyConformance):
    """The family named on pytest's command line."""
