"""Suites: published collections of comparisons, scored as published."""

from btrm_core.evaluation.suites.base import Item, Suite, SuiteResult, SuiteScores, run_suite
from btrm_core.evaluation.suites.registry import GROUP, load_suite, suite_names

__all__ = ["GROUP", "Item", "Suite", "SuiteResult", "SuiteScores", "load_suite", "run_suite", "suite_names"]
