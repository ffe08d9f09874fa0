"""Scoring: rewards of anything, from a finished model. Never imports `training`."""

from btrm_core.scoring.bulk import RayWorkers, Workers, devices, score_file
from btrm_core.scoring.client import AsyncClient, trl_reward_func
from btrm_core.scoring.evaluate import SourceRewards, source_rewards
from btrm_core.scoring.export import export, push, refuse
from btrm_core.scoring.judge import ModelResult, Request, judge
from btrm_core.scoring.kept import Kept
from btrm_core.scoring.onnx import need_onnx, write_onnx
from btrm_core.scoring.results import calibration_values, from_scores, notes, report_of, write_suites
from btrm_core.scoring.scorer import Scorer

__all__ = [
    "AsyncClient",
    "Kept",
    "ModelResult",
    "RayWorkers",
    "Request",
    "Scorer",
    "SourceRewards",
    "Workers",
    "calibration_values",
    "devices",
    "export",
    "from_scores",
    "judge",
    "need_onnx",
    "notes",
    "push",
    "refuse",
    "report_of",
    "score_file",
    "source_rewards",
    "trl_reward_func",
    "write_onnx",
    "write_suites",
]
