"""Training: from a loaded model to a trained one; knows no family."""

from btrm_core.training.engine import make_engine
from btrm_core.training.loop import Seams, fit
from btrm_core.training.loss import bradley_terry
from btrm_core.training.micro_batches import steps
from btrm_core.training.prepare import check_first, choose, choose_family, load_data, output_directory, usable_form
from btrm_core.training.report import Reporter, trackers
from btrm_core.training.resume import clean, find, forget, identity, load, refuse_restart, rewind
from btrm_core.training.rewards import some_rewards
from btrm_core.training.saving import save_run
from btrm_core.training.schedule import Progress, Schedule, schedule
from btrm_core.training.seams import calls, evaluate_now, profiler_of
from btrm_core.training.session import Data, Outcome, Session
from btrm_core.training.summary import closing_text, describe_run, examples, introduce

__all__ = [
    "Data",
    "Outcome",
    "Progress",
    "Reporter",
    "Schedule",
    "Seams",
    "Session",
    "bradley_terry",
    "calls",
    "check_first",
    "choose",
    "choose_family",
    "clean",
    "closing_text",
    "describe_run",
    "evaluate_now",
    "examples",
    "find",
    "fit",
    "forget",
    "identity",
    "introduce",
    "load",
    "load_data",
    "make_engine",
    "output_directory",
    "profiler_of",
    "refuse_restart",
    "rewind",
    "save_run",
    "schedule",
    "some_rewards",
    "steps",
    "trackers",
    "usable_form",
]
