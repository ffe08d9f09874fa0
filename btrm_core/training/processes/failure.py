"""When one of several processes fails: it alone says why, and the others end within seconds.

Decides: who speaks. The first process that fails claims the word in the store all processes share. What fails
elsewhere, on any machine, is a consequence (a connection is lost) and keeps quiet. A process that is stuck in a
collective operation, as NCCL's are when a peer is gone, is ended by a thread that watches the store; no launcher needs
to do it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

from btrm_core.errors import TrainingError

KEY = "btrm/failed"


LOOK_EVERY_SECONDS = 0.5


GRACE_SECONDS = 5.0
"""How long a process has to end by itself after another one failed."""


LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|gloo/transport|remote process", re.IGNORECASE)


@contextlib.contextmanager
def shared(world: int) -> Iterator[None]:
    """While active, a failure of this process ends all, and a failure of another ends this one.

    Args:
        world: Number of processes; with one alone nothing is watched.

    Raises:
        TrainingError: another process is gone, in place of what torch says about connections.

    What is raised carries in an attribute `speaks` whether this process is the one that says why.
    """
    if world == 1:
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    over = threading.Event()
    own = store.clone()  # type: ignore[attr-defined]  # a connection of the thread's own
    threading.Thread(target=_watch, args=(own, over), daemon=True).start()
    try:
        yield
    except Exception as error:
        speaks = _claim(store, over)
        if _lost_a_peer(error):
            lost = TrainingError(
                "another process of this run has ended; its own message is above, or in the log of its machine, or the "
                "system ended it (out of memory?). Go on from the last checkpoint with the same command and --resume"
            )
            lost.speaks = speaks
            raise lost from error
        error.speaks = speaks  # type: ignore[attr-defined]  # of any class: read by the command line
        raise
    finally:
        over.set()


def _claim(store: Any, over: threading.Event) -> bool:
    """Tell all others to end; whether this is the first process that fails."""
    over.set()
    try:
        return bool(store.add(KEY, 1) == 1)
    except RuntimeError:  # the process that keeps the store is gone, and has said why
        return False


def _lost_a_peer(error: BaseException) -> bool:
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def _watch(store: Any, over: threading.Event) -> None:
    while not over.wait(LOOK_EVERY_SECONDS):
        try:
            failed = store.check([KEY])
        except RuntimeError:  # the process that keeps the store is gone: the next operation will fail
            return
        if failed:
            if not over.wait(GRACE_SECONDS):
                os._exit(1)
            return
