"""The cache directory: where it is, how an entry is built once, and how file contents are fingerprinted.

An entry is a folder named by the hash of everything that went into it. It is built under another name and
renamed when whole, so a reader never sees half an entry and two processes that build the same one both
succeed: the second finds the name taken and uses what is there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from btrm_core.errors import DataError
from btrm_core.files import disk_is_full, whole_directory

COMPLETE = "complete.json"  # written last: name and size of every file of the entry


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache directory: the argument, else $BTRM_CACHE, $XDG_CACHE_HOME/btrm, ~/.cache/btrm.

    Args:
        cache_dir: a directory; None or empty if not given.
    """
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

    Args:
        entry: folder of the entry.
        build: writes the files of the entry into the folder it is given.

    Raises:
        DataError: the cache directory cannot be written, or its disk is full.
    """
    if is_whole(entry):
        return entry
    try:
        with whole_directory(entry, keep=is_whole) as folder:
            build(folder)
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            (folder / COMPLETE).write_text(json.dumps(sizes))
    except OSError as error:
        if not disk_is_full(error) and error.errno not in UNWRITABLE:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)  # Arrow wraps the system's words in its own
        raise DataError(
            f"cannot write the data cache '{entry.parent}': {reason}. "
            "Free some space, or set BTRM_CACHE to a folder on another disk."
        ) from error
    return entry


def is_whole(entry: Path) -> bool:
    """Return True if `entry` was finished and all its files still have the size they were written with.

    Args:
        entry: folder of the entry.
    """
    try:
        sizes: dict[str, int] = json.loads((entry / COMPLETE).read_text())
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
