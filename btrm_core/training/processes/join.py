"""How processes find each other: what a launcher has said, where they meet, and that all of them come.

Decides: when a process is alone, how long the others are waited for, and what is said when they do not come. Any
launcher will do that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun, accelerate and deepspeed do.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from btrm_core.errors import ConfigError

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others within a run: for those that still build the data's cache, say."""


RETRY_SECONDS = 0.5


LAUNCHER = "BTRM_LAUNCHER"
"""Variable in which `btrm train --gpus` tells its process id, so that its processes end with it."""


ADVICE = "start with torchrun (or --gpus N, --processes N), or unset them to train in one process"


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process among all, and where they meet."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int

    @property
    def meeting(self) -> str:
        """The meeting place, as variables and value."""
        return f"{self.address}:{self.port} (MASTER_ADDR:MASTER_PORT)"


def place(variables: Mapping[str, str] | None = None) -> Place | None:
    """What a launcher's variables say; None if no launcher started this process.

    Args:
        variables: The environment; None takes that of this process.

    Raises:
        ConfigError: some of the variables are missing, are no numbers, or contradict each other.
    """
    given = os.environ if variables is None else variables
    if not given.get("RANK") and not given.get("WORLD_SIZE"):
        return None  # job scripts export MASTER_ADDR and MASTER_PORT for the launcher they start
    world = _number(given, "WORLD_SIZE", default=1)
    if not given.get("MASTER_ADDR"):
        if world > 1 or _number(given, "RANK", default=0) > 0:
            said = ", ".join(f"{name}={given[name]}" for name in ("RANK", "WORLD_SIZE") if given.get(name))
            raise ConfigError(f"{said} without MASTER_ADDR: {ADVICE}")
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if not given.get(name)]
    if missing:
        raise ConfigError(f"MASTER_ADDR={given['MASTER_ADDR']} without {', '.join(missing)}: {ADVICE}")
    found = Place(
        rank=_number(given, "RANK"),
        world=world,
        local_rank=_number(given, "LOCAL_RANK", default=0),
        address=given["MASTER_ADDR"],
        port=_number(given, "MASTER_PORT"),
    )
    local = _number(given, "LOCAL_WORLD_SIZE", default=found.local_rank + 1)
    _check("RANK", found.rank, 0, world - 1, f"WORLD_SIZE={world}")
    _check("LOCAL_RANK", found.local_rank, 0, local - 1, f"LOCAL_WORLD_SIZE={local}")
    _check("LOCAL_WORLD_SIZE", local, 1, world, f"WORLD_SIZE={world}")
    _check("MASTER_PORT", found.port, 1, 65535, "TCP")
    return found


def join(seconds: float) -> None:
    """Join the process group that a launcher describes, or become a world of one without opening a port.

    Args:
        seconds: How long to wait for the meeting place and for the other processes.

    Raises:
        ConfigError: the launcher's variables are wrong, the port is in use, nothing answers at the meeting place, or
            processes are missing; the message says which.
    """
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() == 1:  # DeepSpeed asks for it; whoever made the group need not have
            os.environ.setdefault("LOCAL_RANK", "0")
        return
    found = place()
    cuda = torch.cuda.is_available()
    more: dict[str, Any] = {}
    if found is None:
        found = Place(rank=0, world=1, local_rank=0, address="", port=0)
        store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
    else:
        if cuda:
            found, more = _own_gpu(found)
        store = _meet(found, seconds)
        _roll_call(store, found, seconds)
        if cuda:
            _refuse_shared_gpus(store, found)
    os.environ["LOCAL_RANK"] = str(found.local_rank)
    backend = "nccl" if cuda else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=found.rank, world_size=found.world, timeout=TIMEOUT, **more
    )


def _own_gpu(found: Place) -> tuple[Place, dict[str, Any]]:
    """The place with the number of its GPU as `local_rank`, and what binds the process group to it."""
    count = torch.cuda.device_count()
    if count == 1:
        found = replace(found, local_rank=0)  # a launcher may show each process its own alone, as Slurm does
    if found.local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK={found.local_rank}, but torch sees {count} GPU(s) on {socket.gethostname()}: "
            f"start {count} process(es) on it"
        )
    torch.cuda.set_device(found.local_rank)
    return found, {"device_id": torch.device("cuda", found.local_rank)} if found.world > 1 else {}


def _refuse_shared_gpus(store: Any, found: Place) -> None:
    """Raise if two processes have the same GPU: NCCL would fail at the first collective, or wait for ever."""
    identity = getattr(torch.cuda.get_device_properties(found.local_rank), "uuid", None)
    if identity is None or found.world == 1:
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = f"{socket.gethostname()} {identity}"
    store.set(f"btrm/gpu/{attempt}/{found.rank}", own)
    for rank in range(found.world):
        if rank != found.rank and store.get(f"btrm/gpu/{attempt}/{rank}").decode() == own:
            raise ConfigError(
                f"processes {min(rank, found.rank)} and {max(rank, found.rank)} have the same GPU on "
                f"{socket.gethostname()} (torch sees {torch.cuda.device_count()}): start one process per GPU, and let "
                "CUDA_VISIBLE_DEVICES show each process its own, or all of them to all"
            )


def _meet(found: Place, seconds: float) -> Any:
    """The store at the meeting place; the process of rank 0 opens it, unless the launcher has done so."""
    hosts = found.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    end = time.monotonic() + seconds
    if not hosts:
        _wait_for_answer(found, seconds)  # torch waits as long, but reports each attempt with a C++ stack
    made: list[Any] = []

    def make() -> None:
        try:
            wait = datetime.timedelta(seconds=max(1.0, end - time.monotonic()))
            made.append(
                torch.distributed.TCPStore(  # type: ignore[attr-defined]
                    found.address,
                    found.port,
                    is_master=hosts,
                    timeout=wait,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
        except Exception as error:
            made.append(error)

    # in a thread, because torch waits forever for a host that takes the connection and does not answer
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(max(1.0, end - time.monotonic()))
    if made and not isinstance(made[0], Exception):
        return made[0]
    cause = made[0] if made else None
    if hosts and "EADDRINUSE" in str(cause):
        raise ConfigError(
            f"port {found.port} is in use on {socket.gethostname()}: choose another MASTER_PORT for all processes "
            "(torchrun: --master-port), or end what listens there"
        ) from cause
    what = "cannot be opened by the process of rank 0" if hosts else "is taken by something else than the run's rank 0"
    raise ConfigError(f"{found.meeting} {what}: choose the address of its machine and a free port") from cause


def _wait_for_answer(found: Place, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((found.address, found.port), timeout=max(0.1, end - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                raise ConfigError(
                    f"process {found.rank} on {socket.gethostname()} waited {seconds:g} s for rank 0 at "
                    f"{found.meeting}: {error.strerror or error}. Is it running, and is the address right? "
                    "--set distributed.join_seconds=N waits longer"
                ) from error
        time.sleep(RETRY_SECONDS)


def _roll_call(store: Any, found: Place, seconds: float) -> None:
    """Wait until every process is here."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"btrm/here/{attempt}/{rank}" for rank in range(found.world)]
    times = store.add(keys[found.rank], 1)
    if times > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        raise ConfigError(f"RANK={found.rank} is given to {times} processes: every one needs its own, from 0 on")
    try:
        store.wait(keys, datetime.timedelta(seconds=seconds))
    except torch.distributed.DistError as error:
        missing = _missing(store, keys)
        if found.rank == 0:
            time.sleep(RETRY_SECONDS)  # this process may keep the store: let the others read it as well
        raise ConfigError(
            f"waited {seconds:g} s for {found.world} processes at {found.meeting}: {missing} did not come. Look there "
            "for why; --set distributed.join_seconds=N waits longer"
        ) from error
    store.set_timeout(TIMEOUT)


def _missing(store: Any, keys: list[str]) -> str:
    with contextlib.suppress(torch.distributed.DistError):
        ranks = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        return f"rank {', '.join(ranks)}" if len(ranks) <= 8 else f"{len(ranks)} of them (rank {ranks[0]} first)"
    return "some of them"


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name) or default
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(f"{name}={text}: expected a whole number; {ADVICE}") from None


def _check(name: str, value: int, least: int, most: int, why: str) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}={value}: expected {least} to {most} ({why}); {ADVICE}")
