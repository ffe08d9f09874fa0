"""`btrm train --gpus N` and `--processes N`: this command starts one process for each and waits for them.

Decides: what the processes are told, which signals are passed on, and that the exit code is theirs: 0 only when all of
them have finished. The first one that fails ends the others. They end with this process, even when it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from btrm_core.errors import ConfigError
from btrm_core.signals import STOPPING
from btrm_core.training.processes.join import LAUNCHER, place

SHUTDOWN_SECONDS = 15.0
"""How long the others have to end by themselves after one failed."""
STOP_SECONDS = 600.0
"""How long they have after they were asked to stop: a checkpoint of a large model takes its time."""
AT_ONCE_SECONDS = 5.0
"""How long they have after a second Ctrl-C."""
LOOK_EVERY_SECONDS = 0.1


def launch(arguments: list[str], gpus: str | None, processes: int | None) -> int:
    """Run `btrm` with `arguments` in several processes; returns the exit code.

    Args:
        arguments: Of this command, `--gpus` and `--processes` among them.
        gpus: A number of GPUs or "all".
        processes: A number of processes.

    Returns:
        0 if all finished; else the code of the first that failed, or 128 plus the signal that stopped them, also where
        they did not end in time.

    Raises:
        ConfigError: more GPUs are asked for than there are, the number makes no sense, or a launcher has already
            started this process as one of several.
    """
    count = count_of(gpus, processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return Launched(["-m", "btrm_core", *_without(arguments, ("--gpus", "--processes"))], count).wait()


def count_of(gpus: str | None, processes: int | None) -> int:
    """How many processes `--gpus` or `--processes` means on this machine; 1 if neither is given.

    Args:
        gpus: A number of GPUs or "all".
        processes: A number of processes.

    Raises:
        ConfigError: as `launch`.
    """
    if gpus is None and processes is None:
        return 1
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
    return count


class Launched:
    """The processes of a run on this machine, from their start to their end.

    They meet at a store that this process keeps, so no port has to be free twice.
    """

    def __init__(self, arguments: list[str], count: int) -> None:
        import torch

        self.asked: list[int] = []
        self.store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        self._before: dict[int, Any] = {}
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._passed_on)
        self.workers = [self._start(arguments, rank, count) for rank in range(count)]

    def _start(self, arguments: list[str], rank: int, count: int) -> subprocess.Popen[bytes]:
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            LAUNCHER: os.getpid(),
        }
        # a group of its own: Ctrl-C on the terminal reaches this process, which passes it on, once
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **{name: str(value) for name, value in told.items()}},
            process_group=0,
        )

    def wait(self) -> int:
        """Wait until all have ended, ending the others when one fails; returns the exit code."""
        try:
            failed = 0
            while not failed and not self.at_once and any(worker.poll() is None for worker in self.workers):
                failed = next((worker.returncode for worker in self.workers if worker.poll()), 0)
                time.sleep(LOOK_EVERY_SECONDS)
            self._end()
            failed = failed or next((worker.returncode for worker in self.workers if worker.poll()), 0)
            if not failed and any(worker.poll() is None for worker in self.workers):
                failed = 128 + self.asked[-1]  # only after a signal can all be well and some still run: ended below
            return _exit_code(failed)
        finally:
            for worker in self.workers:
                if worker.poll() is None:
                    worker.kill()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        """Give those that still run the time to end by themselves, then end them."""
        started, failed = time.monotonic(), SHUTDOWN_SECONDS
        while any(worker.poll() is None for worker in self.workers):
            limit = failed if not self.asked else AT_ONCE_SECONDS if self.at_once else STOP_SECONDS
            if time.monotonic() - started > limit:
                return
            time.sleep(LOOK_EVERY_SECONDS)

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C came more than once."""
        return self.asked.count(signal.SIGINT) > 1

    def _passed_on(self, number: int, _frame: FrameType | None) -> None:
        self.asked.append(number)
        for worker in getattr(self, "workers", ()):
            if worker.poll() is None:
                worker.send_signal(number)


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
