"""Evaluation: what rewards say of pairs. Arrays in, figures out; knows no model and loads no torch."""

from btrm_core.evaluation.assess import Evaluation, assess
from btrm_core.evaluation.best_of_n import BestOfN, best_of_n
from btrm_core.evaluation.compare import Comparison, compare
from btrm_core.evaluation.figures import Judged, NoRewardsError, badness, check_figure, figures_of, require_decided
from btrm_core.evaluation.html import Report, Table, report_text, to_json, write_report
from btrm_core.evaluation.plots import require_matplotlib
from btrm_core.evaluation.probes import PROBES, Invariance, ProbeResult, probed
from btrm_core.evaluation.reading import read_scores
from btrm_core.evaluation.scores import UNKNOWN, PairRewards, PairText, write_scores
from btrm_core.evaluation.statistics import standard_error, wilson
from btrm_core.evaluation.suites import Item, Suite, SuiteResult, load_suite, run_suite, suite_names
from btrm_core.evaluation.text import evaluation_text, percent, short, subset_table

__all__ = [
    "PROBES",
    "UNKNOWN",
    "BestOfN",
    "Comparison",
    "Evaluation",
    "Invariance",
    "Item",
    "Judged",
    "NoRewardsError",
    "PairRewards",
    "PairText",
    "ProbeResult",
    "Report",
    "Suite",
    "SuiteResult",
    "Table",
    "assess",
    "badness",
    "best_of_n",
    "check_figure",
    "compare",
    "evaluation_text",
    "figures_of",
    "load_suite",
    "percent",
    "probed",
    "read_scores",
    "report_text",
    "require_decided",
    "require_matplotlib",
    "run_suite",
    "short",
    "standard_error",
    "subset_table",
    "suite_names",
    "to_json",
    "wilson",
    "write_report",
    "write_scores",
]
