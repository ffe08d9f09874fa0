"""Files of any size: read in windows, scored here, by several processes or on many machines, written in order."""

from btrm_core.scoring.bulk.on_ray import RayWorkers
from btrm_core.scoring.bulk.run import score_file
from btrm_core.scoring.bulk.workers import Workers, devices

__all__ = ["RayWorkers", "Workers", "devices", "score_file"]
