"""Entries of the cache: built once under another name, renamed when whole, believed only if every byte is as written.

An entry is a folder named by the hash of everything that went into it. A reader never sees half an entry, and two
processes that build the same one both succeed: the second finds the name taken and uses what is there. Its record says
what the folder holds, with a checksum of every file; it is compared whenever the entry is opened, and an entry that is
not what was written is built anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from btrm_core.cache.limit import size_limit
from btrm_core.cache.sealed import checksum, seal
from btrm_core.cache.stock import keep_within
from btrm_core.console import tell
from btrm_core.errors import DataError
from btrm_core.files import disk_is_full, whole_directory
from btrm_core.locks import Shared
from btrm_core.signals import stopping_at_once

COMPLETE = "complete.json"
"""The record, written last: size and checksum of every file of the entry. Its access time is that of the last use."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_TRIES = 3
_NOT_OURS = ".nfs"
"""Network file systems keep files under such names that were removed while they were open."""


def build_once(entry: Path, build: Callable[[Path], None]) -> Shared:
    """Return `entry` for use, calling `build(folder)` to make it unless a whole one is there.

    Signals that ask to stop do so at once meanwhile. Afterwards the cache is kept within its limit.

    Args:
        entry: folder of the entry, in the folder of its kind.
        build: writes the files of the entry into the folder it is given.

    Returns:
        The entry at `path`, which no other process removes as long as this object lives.

    Raises:
        DataError: the cache directory cannot be written, its disk is full, or what is written does not last.
        ConfigError: the limit of the cache makes no sense.
    """
    limit, problem = size_limit(), None
    for _ in range(_TRIES):
        held = Shared(entry, entry / COMPLETE)
        problem = damage(entry)
        if problem is None:
            if held.current():
                with contextlib.suppress(OSError):  # a cache of others, perhaps
                    os.utime(held.anchor, ns=(time.time_ns(), held.anchor.stat().st_mtime_ns))
                return held
            continue
        if os.path.lexists(entry):
            tell(f"the cache entry {entry} is damaged ({problem}): building it anew")
        _build(entry, build)
        keep_within(entry.parent.parent, limit, spare=entry)
    problem = problem or "another process removes it"
    raise DataError(
        f"the cache entry '{entry}' does not last: {problem}, right after it was written. "
        "Look after the disk, or set BTRM_CACHE to a folder on another one."
    )


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    try:
        if entry.is_symlink() or (entry.exists() and not entry.is_dir()):
            entry.unlink()  # not a folder, so nothing that btrm has put there
        with stopping_at_once(), whole_directory(entry, keep=_is_whole) as folder:
            build(folder)
            (folder / COMPLETE).write_text(json.dumps(_record(entry.name, folder)), encoding="utf-8")
    except Exception as error:
        full = disk_is_full(error)
        if not full and getattr(error, "errno", None) not in UNWRITABLE:
            raise
        # Arrow and safetensors wrap the system's words in their own
        number = getattr(error, "errno", None) or (errno.ENOSPC if full else None)
        reason = os.strerror(number) if number else str(error)
        raise DataError(
            f"cannot write the data cache '{entry.parent}': {reason}. "
            "Free some space, or set BTRM_CACHE to a folder on another disk."
        ) from error


def _is_whole(entry: Path) -> bool:
    return damage(entry) is None


def _files(folder: Path) -> dict[str, Path]:
    """The files of an entry by their path in it, without its record."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith(_NOT_OURS)]
    named = {str(path.relative_to(folder)): path for path in sorted(paths)}
    named.pop(COMPLETE, None)
    return named


def _record(name: str, folder: Path) -> dict[str, Any]:
    found = {key: [path.stat().st_size, checksum(path)] for key, path in _files(folder).items()}
    return {"files": found, "seal": seal(name, found)}


def damage(entry: Path) -> str | None:
    """What is wrong with an entry; None if it holds what was written, every byte of it, and nothing else.

    Args:
        entry: its folder.
    """
    try:
        record = json.loads((entry / COMPLETE).read_bytes())
        written: dict[str, list[Any]] = record["files"]
        if record["seal"] != seal(entry.name, written):
            return f"{COMPLETE} has changed since it was written"
        found = _files(entry)
        for name in (*written, *found):
            if name not in found:
                return f"{name} is missing"
            if name not in written:
                return f"{name} does not belong to it"
            size = found[name].stat().st_size
            if size != written[name][0]:
                return f"{name} has {size:,} bytes, expected {written[name][0]:,}"
        for name, (_, expected) in written.items():
            if checksum(found[name]) != expected:
                return f"the content of {name} has changed since it was written"
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{COMPLETE} is no record of files"
    return None
