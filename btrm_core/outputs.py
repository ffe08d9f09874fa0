"""Where results are written: regular files, links followed, or what is there and is written to as it stands.

Decides: that a device, a pipe or standard output is never replaced by a file.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from btrm_core.errors import DataError

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def output_file(output: str) -> Path | None:
    """Return the regular file that is to be written, links followed; None for what is written to as it stands.

    Args:
        output: a path, or `-` for standard output.

    Raises:
        DataError: it is a device that holds data, or a socket, or no path.
    """
    if output in STANDARD_OUTPUT:
        return None
    if "\0" in output:
        raise DataError(f"cannot write to {output[:100]!r}: a path holds no NUL character")
    try:
        path = Path(output).expanduser()
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        target = path.resolve() if path.is_symlink() else path
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot write to {output[:100]!r}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return None
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise DataError(f"cannot write to {output}: it is {'a disk' if stat.S_ISBLK(mode) else 'a socket'}, no file")
    return target


@contextlib.contextmanager
def output_stream(output: str) -> Iterator[IO[bytes]]:
    """Open standard output, a pipe or a device for writing; it is never replaced.

    Args:
        output: a file; None or - is standard output.
    """
    if output in STANDARD_OUTPUT:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    with Path(output).expanduser().open("wb", buffering=0) as stream:
        yield stream


@contextlib.contextmanager
def whole_file(output: str) -> Iterator[Path]:
    """A file to write, which comes to its place when the block ends, or not at all.

    Links are followed; standard output, a pipe or a device gets what was written, and is never replaced.

    Args:
        output: a path, or `-` for standard output. Its directory is made if it is missing.

    Raises:
        DataError: as `output_file`.
    """
    target = output_file(output)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            yield partial
        except BaseException:  # Ctrl-C included: nothing half-written stays
            partial.unlink(missing_ok=True)
            raise
        partial.replace(target)
        return
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder) / "whole"
        yield partial
        with output_stream(output) as stream, partial.open("rb") as file:
            shutil.copyfileobj(file, stream)
