"""`--gpus N` and `--processes N`: the same command once per process, through torch's elastic launcher."""

from __future__ import annotations

import os
import subprocess
import sys

from btrm_core.errors import ConfigError


def launch(arguments: list[str], gpus: str | None, processes: int | None) -> int:
    """Start this command on several processes of this machine and return the exit code.

    Raises:
        ConfigError: more GPUs are asked for than there are, or the number makes no sense.
    """
    count = processes if processes is not None else _gpu_count(str(gpus))
    if count < 1:
        raise ConfigError(f"--processes {count}: expected 1 or more")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={count}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--max-restarts=0"]
    command += ["-m", "btrm_core", *_without(arguments, ("--gpus", "--processes"))]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    return subprocess.run(command, env=environment, check=False).returncode


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
