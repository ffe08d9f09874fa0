"""Whole or not at all: how directories come to their place, and which run holds one.

Decides: the one way a directory is put in its place (written beside it, flushed, renamed), and what a full disk is
called.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from btrm_core.errors import CheckpointError
from btrm_core.locks import hold, only_user


def digest(*values: object) -> str:
    """Return the SHA-256 of JSON values, as hex; equal values give equal digests in every process."""
    return text_sha256(json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")))


BUILDING = ".building-"
"""How the names of directories begin that are not finished."""


PROBE = ".probe-"
"""How the names of files begin that only try out whether a directory can be written."""


YOUNG_SECONDS = 2.0
"""The builder of a new directory may not have locked it yet."""


AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux's fcntl.h: paths as the process sees them, and both change places."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


AGAIN_SECONDS = 10.0
"""Between two tries to write to a full disk."""


LOST = (errno.EIO, errno.ESTALE, errno.EROFS, *FULL)
"""What says that something was not written; other errors say that a file system cannot do what it was asked."""


FULL_TEXTS = (*(f"(os error {number})" for number in FULL), "No space left", "enforce fail at inline_container.cc")


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, as hex.

    Args:
        text: also with halves of surrogate pairs.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextlib.contextmanager
def whole_directory(target: Path, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A new directory to fill, which comes to its place when the block ends, or not at all.

    What killed processes have left beside it goes.

    Args:
        target: Its place. Its parents are made.
        keep: Says whether what lies there by then stays and the new one goes; None replaces it in any case.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    target = _place_of_directory(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=BUILDING))
    try:
        with only_user(staging):
            _allow(staging, 0o755)
            yield staging
            publish(staging, target, keep)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what killed processes have left unfinished in a directory; what a running one is building stays.

    Args:
        directory: it may be missing.
    """
    for left in abandoned(directory):
        shutil.rmtree(left, ignore_errors=True)


def abandoned(directory: Path) -> list[Path]:
    """The unfinished directories in a directory that no running process is building.

    Args:
        directory: it may be missing.
    """
    found = []
    for left in directory.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):
            young = time.time() - left.stat().st_mtime < YOUNG_SECONDS
            with only_user(left) as free:
                found += [left] if free and not young else []
    return found


def publish(staging: Path, target: Path, keep: Callable[[Path], bool] | None = None) -> None:
    """Flush a finished directory to disk and rename it to its place, in exchange for what is there if that can be.

    Args:
        staging: Lies on the same disk.
        target: Its place.
        keep: Says whether what is there stays, and `staging` where it is.
    """
    target = _place_of_directory(target)
    for path in sorted(staging.rglob("*")):
        if path.is_file():
            _allow(path, 0o644)  # safetensors leaves its files readable by their owner alone
        if path.is_file() or path.is_dir():
            _fsync(path)
    _fsync(staging)
    if keep is not None and target.exists() and keep(target):
        return
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if keep is not None and keep(target):
            return  # another process was faster
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
        if exchange(staging, target):
            staging.rename(aside / target.name)
        else:
            target.rename(aside / target.name)
            staging.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    _fsync(target.parent)


def _place_of_directory(target: Path) -> Path:
    """Where a directory comes to lie: links are followed, and nothing but a directory is ever replaced.

    Raises:
        NotADirectoryError: a file or a device is there.
    """
    place = target.resolve() if target.is_symlink() else target
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{target} is there and is no directory")
    return place


def exchange(left: Path, right: Path) -> bool:
    """Let two directories change places in one step, so that neither is ever missing; False where that cannot be done.

    Python has no function for it, Linux has `renameat2`; some file systems (NFS) do not.

    Args:
        left: one directory.
        right: the other, on the same file system.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    here = AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right)
    return int(renameat2(*here, RENAME_EXCHANGE)) == 0


def explained(error: Exception, directory: Path) -> Exception:
    """Disk errors as one line; anything else as it is.

    Args:
        error: what was raised.
        directory: where it is written.
    """
    if disk_is_full(error):
        return CheckpointError(f"the disk is full while saving {directory}; nothing was left behind. Free some space")
    if isinstance(error, OSError) or "os error" in str(error):
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        return CheckpointError(f"cannot write {directory}: {reason}; nothing was left behind")
    return error


def disk_is_full(error: Exception) -> bool:
    """True if there is no more room, or no more is allowed; safetensors and torch say so in words of their own.

    Args:
        error: what was raised.
    """
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in FULL_TEXTS)


def _too_large(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EFBIG or f"(os error {errno.EFBIG})" in str(error)


def _allow(path: Path, mode: int) -> None:
    """Let others read a file or directory, where the file system has such modes; some own all files themselves."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno in LOST:
            raise


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():  # it may be written and not read
            return
        raise
    try:
        flush_handle(handle)
    finally:
        os.close(handle)


def flush_handle(handle: int) -> None:
    """Flush an open file to disk where that can be done; a file system that cannot says EINVAL, ENOSYS and the like.

    Args:
        handle: its descriptor.

    Raises:
        OSError: what was written is lost, or may be.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in LOST:
            raise


def probe(directory: Path) -> int:
    """Find out whether a directory can be written to the end, and return the free bytes of its disk.

    A file system that does not say how large it is (some behind FUSE) counts as endless.

    Args:
        directory: It must exist; a file is written there for a moment.

    Raises:
        CheckpointError: it cannot be written or flushed.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=PROBE) as file:
            file.write(b"btrm")
            file.flush()
            flush_handle(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write to the output directory {directory}: {error.strerror}") from error
    return free_bytes(directory)


def free_bytes(directory: Path) -> int:
    """The free bytes of a directory's disk; a great many where the file system does not say.

    Args:
        directory: It must exist.
    """
    try:
        found = os.statvfs(directory)
    except OSError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


def until_there_is_room(write: Callable[[], None], seconds: float, give_up: Callable[[], bool]) -> Iterator[str]:
    """Write once more whenever the disk was full, so that what took days is not lost for want of a few gigabytes.

    Args:
        write: Writes something whole or not at all.
        seconds: How long to go on.
        give_up: Asked several times a second.

    Yields:
        What to tell the user, each time it is tried again.

    Raises:
        CheckpointError: it cannot be written, or there is still no room at the end.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return write()
        except CheckpointError as error:
            cause = error.__cause__
            # no room comes for a file that is larger than a file may be
            full = isinstance(cause, Exception) and disk_is_full(cause) and not _too_large(cause)
            if not full or give_up() or time.monotonic() >= end:
                raise
            yield f"{error}: trying again for {max(1, round((end - time.monotonic()) / 60))} minutes; Ctrl-C gives up"
        again = min(end, time.monotonic() + AGAIN_SECONDS)
        while time.monotonic() < again and not give_up():
            time.sleep(0.2)


@contextlib.contextmanager
def output_lock(directory: Path, is_main: bool) -> Iterator[None]:
    """Hold a run's output directory for this run alone; the lock goes with the process, however it ends.

    Args:
        directory: of the run.
        is_main: whether this process holds it for all.

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
        if not hold(handle):
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise CheckpointError(
                f"another run (process {owner}) is writing to {directory}; choose another --output, or wait for it"
            )
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
