"""What all processes of a run must have in common: versions, settings, data, and the directories they share.

Decides: what is compared, before a difference between two machines costs hours or hides in the numbers; and which
process of those that share a directory comes first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from btrm_core.config import flat
from btrm_core.errors import CheckpointError, ConfigError
from btrm_core.families import Family
from btrm_core.settings import RunConfig
from btrm_core.training.processes.runtime import Runtime

PACKAGES = ("btrm", "torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers")


OWN_TO_A_MACHINE = ("data.cache_dir", "data.workers", "data.train", "data.eval", "output.dir")
"""Settings that may name other places on another machine; of the data, the content is compared."""


SEEN_WITHIN_SECONDS = 5.0
"""How long a network file system may take to show a file that another machine has written."""


def software(config: RunConfig, family: Family) -> dict[str, str]:
    """Versions, origin of the family and resolved settings of this process, by name.

    Args:
        config: Resolved settings; those of `OWN_TO_A_MACHINE` are left out.
        family: Its origin is distribution and version.

    Returns:
        Facts for `agree`.
    """
    facts = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    facts[f"family {family.name}"] = family.origin
    for key, value in flat(config).items():
        if key not in OWN_TO_A_MACHINE:
            facts[key] = str(value)
    if Path(str(config.model.name)).is_dir():
        facts["model.name"] = Path(str(config.model.name)).resolve().name  # it may lie elsewhere on each machine
    return facts


def agree(runtime: Runtime, facts: Mapping[str, str]) -> None:
    """Compare facts over all processes; all take part, and all raise the same error.

    Args:
        runtime: This process.
        facts: Short texts by name, in the order in which a difference is to be told.

    Raises:
        ConfigError: a process has another value; the first difference of the lowest such process is named.
    """
    if runtime.world == 1:
        return
    gathered = gather(runtime, (socket.gethostname(), dict(facts)))
    first_host, first = gathered[0]
    for rank, (host, other) in enumerate(gathered):
        for name in {**first, **other}:
            here, there = first.get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                raise ConfigError(
                    f"process {rank} on {host} has {name} {there}, but process 0 on {first_host} has {here}: "
                    "all processes of a run need the same"
                )


def require_shared(directory: Path, runtime: Runtime) -> None:
    """Raise unless every process sees what the main process writes to a run's directory; all take part.

    Args:
        directory: Where checkpoints are written.
        runtime: This process.

    Raises:
        CheckpointError: one does not, and the checkpoints of the run would lack its part.
    """
    alone = strangers(directory, runtime)
    if alone:
        raise CheckpointError(
            f"{alone}: every process writes its part of a checkpoint, so --output must be a directory that all "
            "machines share (without --save-every and --resume it may be otherwise)"
        )


def strangers(directory: Path, runtime: Runtime) -> str | None:
    """Which process does not see what the main process writes to `directory`, as one line; None if all see it.

    Args:
        directory: Where the main process can write; it may be missing elsewhere.
        runtime: This process; all take part.

    Returns:
        The lowest such rank with its host, the same on every process.
    """
    if runtime.world == 1:
        return None
    first = first_that_shares(directory, runtime, SEEN_WITHIN_SECONDS)
    gathered = gather(runtime, (first, socket.gethostname(), str(directory)))
    _, main, written = gathered[0]
    for rank, (first, host, _) in enumerate(gathered):
        if first != 0:
            return f"process {rank} on {host} does not see what process 0 on {main} writes to {written}"
    return None


def first_that_shares(directory: Path, runtime: Runtime, patience_seconds: float = 0.0) -> int:
    """The lowest rank that sees the same `directory` as this process; all processes take part.

    Each leaves a file there for a moment, so that no launcher need say what is shared with whom.

    Args:
        directory: May be missing on some machines, or not be writable.
        runtime: This process.
        patience_seconds: How long to look for the file of rank 0.
    """
    if runtime.world == 1:
        return 0
    token = gather(runtime, secrets.token_hex(4))[0]
    files = [directory / f".seen-{token}-{rank}" for rank in range(runtime.world)]
    own = files[runtime.rank]
    with contextlib.suppress(OSError):
        own.touch()
    try:
        runtime.barrier()
        end = time.monotonic() + patience_seconds
        while not files[0].exists() and time.monotonic() < end:
            time.sleep(0.1)
        first = next((rank for rank, file in enumerate(files) if file.exists()), runtime.rank)
        runtime.barrier()
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
    return first


def gather(runtime: Runtime, own: Any) -> list[Any]:
    """The small value of every process, on every process, by rank.

    Args:
        runtime: This process; all take part.
        own: What can be pickled; it may differ in type and size between processes.
    """
    values = [own] * runtime.world
    if runtime.world > 1:
        torch.distributed.all_gather_object(values, own)
    return values


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
