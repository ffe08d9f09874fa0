"""How long a process lives that another one started: no longer than that one."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h: the signal a process gets when its parent ends."""


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
