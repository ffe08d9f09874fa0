"""Locks on files: who holds a directory, who reads an entry of the cache; they go with the process, however it ends.

Decides: what is done on file systems that have no locks (some network ones): nothing is held and nothing refused, and
what was in use lately counts as in use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

HELD = (errno.EWOULDBLOCK, errno.EACCES)
"""What says that another holds a lock; all else (ENOLCK, ENOSYS, EINVAL, EIO, ...) that there are none to be had."""
STALE_SECONDS = 24 * 3600.0
"""Where there are no locks: what nobody has touched for so long is in use no more."""


def hold(stream: IO[Any]) -> bool:
    """Lock an open file for this process alone, until it is closed or the process ends; False if another holds it.

    Args:
        stream: the open file.
    """
    return _locked(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB) is not False


class Shared:
    """A lock that says "in use" of a file or directory, as many processes may at the same time.

    It holds until the object goes or the process ends; a pickled one takes the lock anew where it arrives.

    Args:
        path: what is in use.
        anchor: the file that is locked, if it is not `path` itself.

    Attributes:
        path: what is in use.
    """

    def __init__(self, path: Path, anchor: Path | None = None) -> None:
        self.path, self.anchor = path, anchor or path
        self._handle: int | None = None
        with contextlib.suppress(OSError):  # what is not there cannot be held; its reader will say so
            self._handle = _opened(self.anchor)
            _locked(self._handle, fcntl.LOCK_SH)

    def current(self) -> bool:
        """Whether what is held is still what lies there: it may have been removed or replaced before it was held."""
        try:
            return self._handle is None or os.path.samestat(os.fstat(self._handle), self.anchor.stat())
        except OSError:
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self.path, self.anchor)

    def __del__(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.close(self._handle)
                self._handle = None


@contextlib.contextmanager
def only_user(anchor: Path) -> Iterator[bool]:
    """Hold a file or directory for this process alone, if nobody has it in use.

    Args:
        anchor: what is locked by those that use it.

    Yields:
        True if it is held; False if another process uses it, or may do so.
    """
    try:
        handle = _opened(anchor)
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield False
        return
    try:
        got = _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if got is None:
            stat = os.fstat(handle)
            got = time.time() - max(stat.st_mtime, stat.st_atime) > STALE_SECONDS
        yield got
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    """Open for locking; network file systems lock only what is open for writing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _locked(handle: int, how: int) -> bool | None:
    """Whether the lock was had; None where the file system has none."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        return False if error.errno in HELD else None
    return True
