"""Signals that ask a process to stop, and processes that end with the one that started them.

Decides: which signals mean it, and what becomes of work that has nothing to save: it stops at once, cleaning up after
itself. What a training run does instead, which saves first, is `training.processes.interrupt`'s decision.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h: the signal a process gets when its parent ends."""


class Stopped(SystemExit):
    """Another process asked this one to end, which it does with 128 plus the signal's number.

    Args:
        number: of the signal.

    Attributes:
        reason: what to tell the user.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.reason = f"stopped by {signal.Signals(number).name}"


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Meanwhile every signal that asks to stop does so at once: nothing is under way that would have to be saved.

    Ctrl-C raises KeyboardInterrupt, the others raise `Stopped`, so that what is open is closed and unfinished files are
    removed. What is ignored stays ignored (SIGHUP under nohup). Outside the main thread nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _stop(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold such signals back from this thread until the block ends, and for good from processes that it starts.

    A Ctrl-C on the terminal goes to all processes of a command: those that are only helpers leave it to the one that
    started them, also while they are still starting.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """Let the system end this process when its parent ends, however that ends (Linux; nothing elsewhere).

    Args:
        parent: Process id of the parent: if it has ended already, so does this process.
    """
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
