"""Scoring: rewards of anything, from a finished model. Never imports `training`."""

from btrm_core.scoring.bulk import score_file
from btrm_core.scoring.evaluate import evaluate_sources
from btrm_core.scoring.scorer import Scorer

__all__ = ["Scorer", "evaluate_sources", "score_file"]
