"""`--gpus N` and `--processes N`: the same command once per process, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from btrm_core.errors import ConfigError
from btrm_core.training.processes.join import place

SHUTDOWN_SECONDS = 120
"""How long processes that were asked to stop have to save a checkpoint; $TORCH_ELASTIC_SHUTDOWN_TIMEOUT wins."""


def launch(arguments: list[str], gpus: str | None, processes: int | None) -> int:
    """Start this command on several processes of this machine and return the exit code.

    Raises:
        ConfigError: more GPUs are asked for than there are, the number makes no sense, or a launcher has already
            started this process as one of several.
    """
    asked = f"--gpus {gpus}" if gpus is not None else f"--processes {processes}"
    if gpus is not None and processes is not None:
        raise ConfigError(f"{asked} --processes {processes}: expected one of them; --gpus starts one process per GPU")
    if place() is not None:
        raise ConfigError(
            f"{asked}: a launcher has started this process already (RANK={os.environ['RANK']}, "
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}); leave it out, and give the launcher the number of processes"
        )
    count = processes if processes is not None else _gpu_count(str(gpus))
    if count < 1:
        raise ConfigError(f"{asked}: expected 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return _run(["-m", "btrm_core", *_without(arguments, ("--gpus", "--processes"))], count)


def _run(arguments: list[str], count: int) -> int:
    """Run this interpreter `count` times; the first process that fails ends the others and gives the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the failing process has said what is wrong; the launcher's account of it would hide that
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 0
    return 0


def _exit_code(code: int) -> int:
    """A process that a signal ended reports its negative number; a shell says 128 plus it."""
    return 128 - code if code < 0 else code


def _gpu_count(gpus: str) -> int:
    import torch

    available = torch.cuda.device_count()
    if gpus == "all":
        count = available
    elif gpus.isdecimal():
        count = int(gpus)
    else:
        raise ConfigError(f"--gpus {gpus}: expected a number or all")
    if available == 0:
        raise ConfigError(f"--gpus {gpus}: torch sees no GPU on this machine; on a CPU use --processes N")
    if count > available:
        raise ConfigError(f"--gpus {count}: this machine has {available}; use --gpus {available} or fewer")
    return count


def _without(arguments: list[str], flags: tuple[str, ...]) -> list[str]:
    """The arguments without these flags and their values, in both spellings."""
    out, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in flags:
            skip = True
        elif not argument.startswith(tuple(f"{flag}=" for flag in flags)):
            out.append(argument)
    return out
