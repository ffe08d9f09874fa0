"""Processes of a run: how they start, find each other, agree, and stop together."""

from btrm_core.training.processes.agreement import agree, first_that_shares, gather, require_shared, software, strangers
from btrm_core.training.processes.interrupt import Interrupt
from btrm_core.training.processes.launch import count_of, launch
from btrm_core.training.processes.runtime import Runtime, group, is_main_process, leave, quiet, start
from btrm_core.training.processes.sharing import check_shares
from btrm_core.training.processes.zero import PRESETS, compute_dtype, deepspeed_config

__all__ = [
    "PRESETS",
    "Interrupt",
    "Runtime",
    "agree",
    "check_shares",
    "compute_dtype",
    "count_of",
    "deepspeed_config",
    "first_that_shares",
    "gather",
    "group",
    "is_main_process",
    "launch",
    "leave",
    "quiet",
    "require_shared",
    "software",
    "start",
    "strangers",
]
