"""Scoring: rewards of anything, from a finished model. Never imports `training`."""

from btrm_core.scoring.bulk import score_file
from btrm_core.scoring.client import AsyncClient, trl_reward_func
from btrm_core.scoring.evaluate import evaluate_sources
from btrm_core.scoring.export import export
from btrm_core.scoring.scorer import Scorer

__all__ = ["AsyncClient", "Scorer", "evaluate_sources", "export", "score_file", "trl_reward_func"]
