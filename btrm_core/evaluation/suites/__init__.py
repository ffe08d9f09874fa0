"""Suites: published collections of comparisons, scored as published."""

from btrm_core.evaluation.suites.base import Item, Suite, SuiteResult, SuiteScores, run
from btrm_core.evaluation.suites.registry import GROUP, load_suite, suite_names

__all__ = ["GROUP", "Item", "Suite", "SuiteResult", "SuiteScores", "load_suite", "run", "suite_names"]
