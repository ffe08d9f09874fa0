"""Which processes of a run share the rows of one rank: sequence parallelism's groups, and what must hold for them.

Decides: neighbours in rank share, since launchers count the processes of one machine one after another and what they
exchange in every layer should not cross machines; and what each of them may count, so that nothing counts twice.
"""

from __future__ import annotations

import torch

from btrm_core.errors import ConfigError
from btrm_core.model import RowShare
from btrm_core.settings import RunConfig
from btrm_core.training.processes.join import TIMEOUT


def check_shares(config: RunConfig, world: int) -> None:
    """Refuse a run whose processes cannot share rows as asked.

    Args:
        config: The settings, resolved or not.
        world: Number of processes.

    Raises:
        ConfigError: `--sequence-parallel` does not divide the processes, or rows are padded lines.
    """
    count = config.distributed.sequence_parallel
    if world % count:
        have = "1 process" if world == 1 else f"{world} processes"
        raise ConfigError(
            f"--sequence-parallel {count} with {have}: expected a number of processes that it divides; give --gpus N "
            f"(on a CPU --processes N, to another launcher its own flag) with N = {count} or a multiple"
        )
    if count > 1 and config.train.layout == "padded":
        raise ConfigError(
            f"--sequence-parallel {count} with train.layout=padded: only packed rows can be shared; use "
            "train.layout=shared, or leave --sequence-parallel out"
        )


def make_share(config: RunConfig, rank: int, world: int) -> RowShare | None:
    """This process's part of every row; None if every process computes rows of its own. All processes call it.

    Args:
        config: The settings.
        rank: Of this process.
        world: Number of processes.

    Raises:
        ConfigError: as `check_shares`.
    """
    check_shares(config, world)
    count = config.distributed.sequence_parallel
    if count == 1:
        return None
    groups = [
        torch.distributed.new_group(list(range(first, first + count)), timeout=TIMEOUT)
        for first in range(0, world, count)
    ]
    return RowShare(index=rank % count, count=count, processes=groups[rank // count])
