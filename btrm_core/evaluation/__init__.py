"""Evaluation: what rewards say of pairs. Arrays in, figures out; knows no model and loads no torch."""

from btrm_core.evaluation.assess import Evaluation, assess
from btrm_core.evaluation.best_of_n import BestOfN, best_of_n
from btrm_core.evaluation.compare import Comparison, compare
from btrm_core.evaluation.figures import Judged, figures_of, standard_error
from btrm_core.evaluation.scores import UNKNOWN, PairRewards, PairText, read_scores, write_scores
from btrm_core.evaluation.text import evaluation_text, format_evaluation, subset_table

__all__ = [
    "UNKNOWN",
    "BestOfN",
    "Comparison",
    "Evaluation",
    "Judged",
    "PairRewards",
    "PairText",
    "assess",
    "best_of_n",
    "compare",
    "evaluation_text",
    "figures_of",
    "format_evaluation",
    "read_scores",
    "standard_error",
    "subset_table",
    "write_scores",
]
