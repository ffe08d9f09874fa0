"""The test module that `pytest --btrm-family=NAME` runs; `btrm_core.pytest_plugin` puts the name in."""

from __future__ import annotations

from btrm_core.testing import FamilyConformance


class TestFamily(FamilyConformance):
    """The family named on pytest's command line."""
