"""Bytes of a file, whatever it is packed in, and files that can be read only once.

Decides: that a packed file which breaks off still gives what comes before the break, and that a pipe is copied into the
cache, where it can be read as often as a file.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import hashlib
import io
import lzma
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from btrm_core import cache
from btrm_core.errors import DataError, first_line
from btrm_core.locks import Shared, hold

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_HEADERS = (b"chosen", b"rejected", b"prompt", b"response", b"instruction", b"question")
_BUFFER = 1 << 16
_SMALL_READ = 1 << 13
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


class Unpacked(io.RawIOBase):
    """The unpacked bytes of a file; where they break off they end, and `broken` says why.

    Args:
        path: the file; its packing is told by its ending, else by its first bytes (gzip and zstd).

    Attributes:
        packing: gzip, zstd, bzip2, xz or an empty string.
        broken: what is wrong with the packed data, once the end was reached; None if nothing is.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.broken: str | None = None
        start = self._file.peek(4)[:4]
        found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
        self.packing = PACKED.get(path.suffix.lower(), found)
        self._read = _reader(self._file, self.packing)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer.

        Args:
            buffer: a writable buffer of bytes, filled from its beginning.

        Returns:
            The number of bytes read; 0 at the end, or where the data is broken.

        Raises:
            OSError: the disk fails.
        """
        if self.broken:
            return 0
        try:
            data = self._read(len(buffer))
        except (EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            self.broken = str(error)
            return 0
        except OSError as error:
            if error.errno:  # the disk, not the data
                raise
            self.broken = first_line(error)
            return 0
        buffer[: len(data)] = data
        return len(data)

    @property
    def position(self) -> int:
        """Bytes of the packed file that were read."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _reader(file: io.BufferedReader, packing: str) -> Callable[[int], bytes]:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=file).read1
    if packing == "bzip2":
        return bz2.BZ2File(file).read1
    if packing == "xz":
        return lzma.LZMAFile(file).read1
    if packing == "zstd":
        import pyarrow

        unpacked = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return lambda size: bytes(unpacked.read(min(size, _SMALL_READ)))
    return file.read1


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedReader, Unpacked]]:
    """Open a file for reading its unpacked bytes; also gives the stream that knows whether they broke off.

    Args:
        path: the file, packed or not.

    Yields:
        The bytes, buffered, and the stream under them; both are closed at the end of the block.

    Raises:
        OSError: the file cannot be opened.
    """
    with Unpacked(path) as raw:
        yield io.BufferedReader(raw, _BUFFER), raw


def local_path(spec: str) -> Path:
    """Return a path with `~` put in.

    Args:
        spec: the path as the user wrote it.

    Raises:
        DataError: it is no path: there is no such user, or it holds a NUL.
    """
    if "\0" in spec:
        raise DataError(f"{spec!r} is no path: it holds a NUL character.")
    try:
        return Path(spec).expanduser()
    except RuntimeError as error:
        raise DataError(f"'{spec}' names the home of an unknown user. Write the path in full.") from error


def kind_of_file(path: Path, spec: str) -> str:
    """Return "file", "folder", "pipe" or "" for nothing there.

    Args:
        path: the path; links are followed.
        spec: the same as the user wrote it, for messages; one of `STANDARD_INPUT` is a pipe.

    Raises:
        DataError: it is a device or a socket, or it cannot be looked at.
    """
    if spec in STANDARD_INPUT:
        return "pipe"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"'{spec}' is a link to '{path.readlink()}', which does not exist.") from None
        return ""
    except OSError as error:
        raise DataError(f"cannot read '{spec[:100]}': {error.strerror or error}.") from error
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISFIFO(mode):
        return "pipe"
    raise DataError(f"'{spec}' is a device or a socket, expected a file, a folder or a pipe.")


def data_path(spec: str, root: Path) -> tuple[Path, str]:
    """Return the file or folder that is meant, and which: "file", "folder" or "". A pipe is copied into the cache.

    Args:
        spec: the path as the user wrote it, or `-` for standard input.
        root: the cache directory.

    Returns:
        The path (of the copy, for a pipe) and its kind; "" if nothing is there.

    Raises:
        DataError: it is a device, or cannot be read.
    """
    path = local_path(spec)
    kind = kind_of_file(path, spec)
    return (spooled(spec, root), "file") if kind == "pipe" else (path, kind)


def spooled(spec: str, root: Path) -> Path:
    """Copy standard input or a pipe into the cache, once, and return the copy.

    Args:
        spec: `-`, `/dev/stdin` or the path of a pipe.
        root: the cache directory.

    Returns:
        The copy, named by its content; asked again, the process gives the same without reading.

    Raises:
        DataError: nothing can be read, the cache cannot be written, or several processes would share the pipe.
        ConfigError: the limit of the cache makes no sense.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DataError(f"'{spec}' can be read by one process only, and this run has several. Write it to a file.")
    return _spooled("-" if spec in STANDARD_INPUT else spec, root)


@functools.cache
def _spooled(spec: str, root: Path) -> Path:
    name = "standard input" if spec == "-" else f"the pipe {spec}"
    if spec == "-" and sys.stdin is None:
        raise DataError("there is no standard input to read.")
    print(f"reading {name} to its end", file=sys.stderr)
    folder = root / "piped"
    part = folder / f"{cache.NEW}{secrets.token_hex(8)}"
    limit = cache.size_limit()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stdin = getattr(sys.stdin, "buffer", sys.stdin)
        with contextlib.ExitStack() as stack:
            source = stdin if spec == "-" else stack.enter_context(Path(spec).open("rb"))
            target = stack.enter_context(part.open("wb"))
            hold(target)  # unfinished, but not abandoned
            shutil.copyfileobj(cast("IO[bytes]", source), target)
        with part.open("rb") as copy:
            content = hashlib.file_digest(copy, "sha256").hexdigest()
        made = folder / f"{content[:16]}{_ending(part)}"
        part.replace(made)
    except OSError as error:
        raise DataError(f"cannot read {name} into {folder}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)
    if not made.stat().st_size:
        raise DataError(f"{name} is empty.")
    _in_use.append(Shared(made))
    cache.keep_within(root, limit, spare=made)
    return made


_in_use: list[Shared] = []
"""Copies that this process may still read: they stay in the cache until it ends."""


def _ending(path: Path) -> str:
    """What is in a pipe: Parquet and Arrow by their first bytes, CSV by its header, else an array or lines of JSON."""
    with path.open("rb") as stream:
        start = stream.read(1 << 12)
    header = start.partition(b"\n")[0].lower()
    if start.startswith((b"PAR1", b"ARROW1")):
        return ".parquet" if start.startswith(b"PAR1") else ".arrow"
    is_table = not header.lstrip(b"\xef\xbb\xbf ").startswith((b"{", b"["))
    return ".csv" if is_table and any(name in header for name in _HEADERS) else ".json"
