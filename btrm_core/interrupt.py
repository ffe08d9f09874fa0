"""Being asked to stop, and keeping two runs out of one directory.

Decides: the first Ctrl-C or SIGTERM lets the step finish and a checkpoint be saved; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from btrm_core.errors import CheckpointError


class Interrupt:
    """Catches SIGINT and SIGTERM while a run lasts; `signal` says which one came."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """True once a signal came."""
        return self.signal is not None

    def _caught(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def output_lock(directory: Path, is_main: bool) -> Iterator[None]:
    """Hold a run's output directory for this run alone; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another run holds it, or the directory cannot be written.
    """
    if not is_main:
        yield
        return
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write to the output directory {directory}: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise CheckpointError(
                f"another run (process {owner}) is writing to {directory}; choose another --output, or wait for it"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
