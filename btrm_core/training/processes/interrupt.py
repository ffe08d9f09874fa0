"""Being asked to stop: which signals mean it, and what the process then leaves with.

Decides: the first Ctrl-C, SIGTERM, SIGUSR1 (Slurm's `--signal=USR1@60`) or SIGHUP lets the step finish and a
checkpoint be saved; a second Ctrl-C stops at once. SIGHUP means nothing to a process that was told to outlive its
terminal (nohup). SIGQUIT keeps its meaning: end at once, with a core where those are on.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupt:
    """Catches what asks a run to stop while it lasts; `signal` says which one came."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
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
