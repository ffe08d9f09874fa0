"""The cache directory: where it is, how an entry is built once, and how file contents are fingerprinted.

An entry is a folder named by the hash of everything that went into it. It is built under another name and
renamed when whole, so a reader never sees half an entry and two processes that build the same one both
succeed: the second finds the name taken and uses what is there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from btrm_core.errors import DataError

COMPLETE = "complete.json"  # written last: name and size of every file of the entry


_STALE_SECONDS = 24 * 3600.0


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache directory: the argument, else $BTRM_CACHE, $XDG_CACHE_HOME/btrm, ~/.cache/btrm."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    if given := os.environ.get("BTRM_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "btrm"


@functools.cache
def code_digest(*packages: str) -> str:
    """Return the SHA-256 of the source of whole packages of btrm_core, by their names.

    Part of every cache key: an entry written by other code is not read, even between two releases. Read once
    per process, so that an edit beside a running program does not change its mind.

    Raises:
        FileNotFoundError: a package has no module; the digest of nothing would let old entries pass for new ones.
    """
    whole = hashlib.sha256()
    for package in packages:
        paths = sorted((Path(__file__).parent.parent / package).rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"btrm_core has no package {package!r}: the cache key needs its source")
        for path in paths:
            whole.update(path.read_bytes())
    return whole.hexdigest()


def build_once(entry: Path, build: Callable[[Path], None]) -> Path:
    """Return `entry`, calling `build(folder)` to make it unless a whole one is there.

    Raises:
        DataError: the cache directory cannot be written, or its disk is full.
    """
    if is_whole(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent)
        folder = _fresh(entry.parent)
        folder.mkdir()
    except OSError as error:
        raise _unwritable(entry.parent, error) from error
    try:
        build(folder)
        _seal(folder)
        _publish(folder, entry)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unwritable(entry.parent, error) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return entry


def is_whole(entry: Path) -> bool:
    """Return True if `entry` was finished and all its files still have the size they were written with."""
    try:
        sizes: dict[str, int] = json.loads((entry / COMPLETE).read_text())
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _fresh(parent: Path) -> Path:
    return parent / f".building-{os.getpid()}-{secrets.token_hex(4)}"


def _seal(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / COMPLETE).write_text(json.dumps(sizes))


def _publish(folder: Path, entry: Path) -> None:
    """Rename `folder` to `entry`; a damaged entry in the way is moved aside, a whole one wins."""
    for _ in range(3):
        try:
            folder.rename(entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_whole(entry):
            return
        aside = _fresh(entry.parent)
        with contextlib.suppress(OSError):  # another process may have moved it first
            entry.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"cannot replace the damaged cache entry '{entry}'. Remove it and try again.")


def _sweep(parent: Path) -> None:
    """Remove what killed processes left behind."""
    for path in parent.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _unwritable(parent: Path, error: OSError) -> DataError:
    reason = os.strerror(error.errno) if error.errno else str(error)  # Arrow wraps the system's words in its own
    return DataError(
        f"cannot write the data cache '{parent}': {reason}. "
        "Free some space, or set BTRM_CACHE to a folder on another disk."
    )
