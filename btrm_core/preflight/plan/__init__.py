"""Plan: memory and time of a run on a GPU, from the configuration of a model alone."""

from btrm_core.preflight.plan.activations import Kept
from btrm_core.preflight.plan.estimate import estimate, format_estimate, to_dict
from btrm_core.preflight.plan.hardware import read_hardware
from btrm_core.preflight.plan.workload import Workload

__all__ = ["Kept", "Workload", "estimate", "format_estimate", "read_hardware", "to_dict"]
