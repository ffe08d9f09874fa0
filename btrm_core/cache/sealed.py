"""Values and digests that are trusted only if they are as they were written: checksums, sealed values, files' digests.

Decides: the checksum (XXH3 of 128 bits, some 10 GB/s) and what a kept value has to carry to be believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from btrm_core import files
from btrm_core.console import tell
from btrm_core.errors import DataError

_BUFFER = 1 << 18
"""Of bytes that stay in the processor's own cache; larger ones halve the speed."""
_SETTLED_SECONDS = 2.0
"""A file written within this time of being hashed may change again without its time stamp showing it."""
NEW = ".new-"
"""How the names of files begin that are not finished."""


def checksum(path: Path) -> str:
    """XXH3 of a file's content, as hex; read, not mapped, so that a broken disk is an error and not a signal.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
    """
    import xxhash

    whole, buffer = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            whole.update(buffer[:size])
    return str(whole.hexdigest())


def seal(name: str, value: Any) -> str:
    """The checksum that goes with a value: of its text and of the name it is kept under.

    Args:
        name: its name, so that it is not taken for another's.
        value: what JSON can hold.
    """
    import xxhash

    text = json.dumps([name, value], sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128(text.encode()).hexdigest())


def kept_value(path: Path) -> Any:
    """A value that `keep_value` has written; None if there is none, or it is damaged, which is said.

    Args:
        path: where it is kept.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return None
    try:
        found = json.loads(text)
        if found["seal"] == seal(path.name, found["value"]):
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            return found["value"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    tell(f"the cache entry {path} is damaged (it has changed since it was written): making it anew")
    return None


def keep_value(path: Path, value: Any) -> None:
    """Keep a value for later runs, if the cache can be written: only time is lost without it.

    Args:
        path: where it is kept; a damaged one is replaced.
        value: what JSON can hold.
    """
    part = path.with_name(f"{NEW}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps({"value": value, "seal": seal(path.name, value)}), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def file_sha256(path: Path, root: Path) -> str:
    """Return the SHA-256 of a file's content.

    The content is read again only when size, inode, modification or change time differ from the last time;
    the change time cannot be set back by a program, so a changed file is always noticed.

    Args:
        path: the file.
        root: of the cache, where digests are kept.

    Raises:
        DataError: the file cannot be read.
    """
    known = root / "hashes" / f"{files.digest(str(path.resolve()))}.json"
    try:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        remembered = kept_value(known)
        if remembered is not None and remembered["state"] == state:
            return str(remembered["sha256"])
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}.") from error
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
        keep_value(known, {"state": state, "sha256": found})
    return found
