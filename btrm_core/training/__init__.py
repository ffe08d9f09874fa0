"""Training: from a loaded model to a trained one; knows no family."""

from btrm_core.training import resume
from btrm_core.training.engine import make_engine, start_engine
from btrm_core.training.identity import fingerprints, identity, settings_changed
from btrm_core.training.loop import Seams, fit
from btrm_core.training.loss import bradley_terry
from btrm_core.training.micro_batches import steps
from btrm_core.training.prepare import check_first, choose, choose_family, expected_form, load_data, usable_form
from btrm_core.training.report import Reporter, trackers
from btrm_core.training.rewards import AskedToStop, some_rewards
from btrm_core.training.saving import check_room, publish_best, save_run
from btrm_core.training.schedule import Progress, Schedule, plan_of_epoch
from btrm_core.training.seams import evaluate_now, seams
from btrm_core.training.session import Data, Job, Outcome, Session
from btrm_core.training.summary import (
    closing_text,
    describe_run,
    examples,
    held_out_rewards,
    introduce,
    write_training_report,
)

__all__ = [
    "AskedToStop",
    "Data",
    "Job",
    "Outcome",
    "Progress",
    "Reporter",
    "Schedule",
    "Seams",
    "Session",
    "bradley_terry",
    "check_first",
    "check_room",
    "choose",
    "choose_family",
    "closing_text",
    "describe_run",
    "evaluate_now",
    "examples",
    "expected_form",
    "fingerprints",
    "fit",
    "held_out_rewards",
    "identity",
    "introduce",
    "load_data",
    "make_engine",
    "plan_of_epoch",
    "publish_best",
    "resume",
    "save_run",
    "seams",
    "settings_changed",
    "some_rewards",
    "start_engine",
    "steps",
    "trackers",
    "usable_form",
    "write_training_report",
]
