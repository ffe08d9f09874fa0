"""Evaluation: what rewards say of pairs. Arrays in, figures out; knows no model and loads no torch."""

from btrm_core.evaluation.figures import Judged, figures_of, standard_error
from btrm_core.evaluation.text import evaluation_text, format_evaluation, subset_table

__all__ = ["Judged", "evaluation_text", "figures_of", "format_evaluation", "standard_error", "subset_table"]
