"""Several processes on this machine, with a copy of the model each, that score the windows of one file.

Decides: which process gets which window; that the order is kept; that the windows of a process which ends are scored by
another, until one of them has ended several; that all processes end at once when this one stops, however it stops.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from btrm_core.errors import CheckpointError, ConfigError, DataError
from btrm_core.scoring.bulk.windows import Finished, Windows
from btrm_core.scoring.bulk.worker import Job, Setup, work

AT_WORK = 2
"""Windows that a process has: one is computed, one encoded."""
AHEAD = 3
"""Windows for every process, of those that are read, scored, or wait for an earlier one to be written."""
TRIES = 3
"""How many processes a window, or the loading of the model, may end."""


def devices(gpus: str | None, processes: int | None) -> list[str | None]:
    """Return the device of each process that `--gpus` or `--processes` asks for; none if neither is given.

    Args:
        gpus: a number of GPUs, or "all".
        processes: a number of processes.

    Raises:
        ConfigError: there are not so many GPUs, or the number makes no sense.
    """
    import torch

    if gpus is not None and processes is not None:
        raise ConfigError(f"--gpus {gpus} --processes {processes}: expected one of them; --gpus starts one per GPU")
    if processes is not None:
        if processes < 1:
            raise ConfigError(f"--processes {processes}: expected 1 or more")
        if processes > 1 and torch.cuda.is_available():
            raise ConfigError(f"--processes {processes}: this machine has GPUs, use --gpus for one process on each")
        return [None] * processes
    if gpus is None:
        return []
    there = torch.cuda.device_count()
    count = there if gpus == "all" else int(gpus) if gpus.isdecimal() else 0
    if not there:
        raise ConfigError(f"--gpus {gpus}: torch sees no GPU on this machine; on a CPU use --processes N")
    if not 1 <= count <= there:
        raise ConfigError(f"--gpus {gpus}: expected 1 to {there}, or all")
    return [f"cuda:{number}" for number in range(count)]


class _Jobs:
    """The windows of a file that no process has: those to be scored again, then those not yet read."""

    def __init__(self, windows: Windows) -> None:
        self.again: deque[Job] = deque()
        self.read, self.over = 0, False
        self._windows, self._coming = windows, iter(windows)
        self._broken: DataError | None = None

    def next(self, end: int, alone: bool) -> Job | None:
        """The next one, unless it is `end` or later, or has ended a process and would not be scored alone."""
        if self.again:
            return None if self.again[0].ended and not alone else self.again.popleft()
        if self.over or self.read >= end:
            return None
        window = None
        try:
            window = next(self._coming, None)
        except DataError as error:
            self._broken = error
        if window is None:
            self.over = True
            return None
        self.read += 1
        return Job(self.read - 1, window, self._windows.naming)

    def complain(self) -> None:
        """Raise what kept the file from being read to its end."""
        if self._broken is not None:
            raise self._broken


@dataclass(eq=False)
class _Worker:
    """One process as this one sees it."""

    setup: Setup
    process: Any
    connection: Connection
    ready: bool = False
    jobs: list[Job] = field(default_factory=list)

    @property
    def takes(self) -> bool:
        """Whether it may get a window; one that has ended a process is scored alone, so that no other is blamed."""
        return self.ready and len(self.jobs) < AT_WORK and not (self.jobs and self.jobs[0].ended)


class Workers:
    """Processes with a copy of a model each; to be used in a `with` statement, at whose end they end.

    Args:
        model: as for `Scorer`.
        places: the device of each process; None takes the GPU if there is one.
        options: keywords of `Scorer`.

    Raises:
        BtrmError: as `Scorer`.

    Attributes:
        identity: the model's; see `Scorer`.
        tokens_per_batch: tokens of a row.
    """

    def __init__(self, model: str, places: Sequence[str | None], **options: Any) -> None:
        self._start_method = multiprocessing.get_context("spawn")
        threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // len(places))
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self.identity, self.tokens_per_batch = "", 0
        try:
            for number, device in enumerate(places):
                setup = Setup(model, {**options, "device": device}, threads, os.getpid(), loud=not number)
                self._workers.append(self._started(setup))
            while not self.identity:
                self._listen()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids, as they are now."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End all processes at once, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def finished(self, windows: Windows) -> Iterator[Finished]:
        """Yield every window with its rewards, in order.

        Args:
            windows: of a file.

        Raises:
            DataError: several processes ended over one window; it says which rows.
            BtrmError: as `Scorer` does, and as reading does.
        """
        for worker in [worker for worker in self._workers if worker.jobs]:  # of a file that was given up
            worker.process.kill()
            self._restart(worker)
        jobs = _Jobs(windows)
        done: dict[int, Finished] = {}
        written = 0
        while True:
            for worker in self._workers:
                while worker.takes and (job := jobs.next(written + AHEAD * len(self._workers), alone=not worker.jobs)):
                    self._hand(worker, job)
            if jobs.over and written == jobs.read:
                jobs.complain()
                return
            for job, result in self._listen(jobs.again):
                done[job.number] = result
            while written in done:
                yield done.pop(written)
                written += 1

    def _hand(self, worker: _Worker, job: Job) -> None:
        worker.jobs.append(job)
        with contextlib.suppress(OSError):  # it has ended, which `_listen` will hear
            worker.connection.send(job)

    def _listen(self, again: deque[Job] | None = None) -> list[tuple[Job, Finished]]:
        """Wait for a process to say something or to end; returns what is scored."""
        found = []
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                said = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker, again if again is not None else deque())
                continue
            if isinstance(said, BaseException):
                raise said
            if isinstance(said, Finished):
                found.append((worker.jobs.pop(0), said))
            else:
                self.identity, self.tokens_per_batch = said
                worker.ready, self._failed_starts = True, 0
        return found

    def _replace(self, worker: _Worker, again: deque[Job]) -> None:
        """Start another process for one that has ended; its windows are the next to be scored."""
        worker.process.join()
        code = worker.process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= TRIES:
                raise CheckpointError(
                    f"{worker.setup.model}: {TRIES} processes ended while they loaded the model, the last by {how}; is "
                    "there memory for so many copies? Ask for fewer processes"
                )
        elif worker.jobs:
            first = worker.jobs[0]
            first.ended += 1
            if first.ended >= TRIES:
                raise DataError(
                    f"{first.window.named}: {TRIES} processes ended while they scored these, the last by {how}; out of "
                    "memory? Make --tokens-per-batch smaller, or take the rows out. What comes before them is kept"
                )
        jobs = sorted([*worker.jobs, *again], key=lambda job: job.number)
        again.clear()
        again.extend(jobs)
        _log.warning("a process that scores has ended by %s; another one takes its %d windows", how, len(worker.jobs))
        self._restart(worker)

    def _restart(self, worker: _Worker) -> None:
        worker.process.join()
        worker.connection.close()
        self._workers[self._workers.index(worker)] = self._started(worker.setup)

    def _started(self, setup: Setup) -> _Worker:
        here, there = self._start_method.Pipe()
        process = self._start_method.Process(target=work, args=(there, setup), daemon=True)
        with _deaf():
            process.start()
        there.close()
        return _Worker(setup, process, here)


_log = logging.getLogger("btrm")


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore Ctrl-C, as a process that is started inside will from its first moment: it ends when this one says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
