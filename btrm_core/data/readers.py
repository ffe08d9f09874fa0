"""Reads rows one after the other, each with its line, without ever holding a whole file.

What cannot be read is yielded in the row's place as a `RowIssue`; a file that breaks off (truncated gzip,
broken array) gives the rows before the break and one issue for the rest.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from btrm_core.data.issues import RowIssue
from btrm_core.errors import DataError, first_line

if TYPE_CHECKING:
    from btrm_core.data.sources import Source

Row = dict[str, Any]


Numbered = tuple[int, "Row | RowIssue"]


BATCH_ROWS = 1000


_CHUNK_CHARACTERS = 1 << 20


_BLANK = re.compile(r"[\s,]*")


_TEXT_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


# Columns of a CSV file that hold a number, or messages written as JSON.
_CSV_NUMBER = re.compile(r"margin|weight|(.*_)?(score|rating|preference|strength)(_.*)?|helpfulness|better_response_id")


_CSV_LISTS = {"responses", "completions", "answers", "scores", "ratings", "ranks", "conversations"}


def read_rows(source: Source) -> Iterator[Numbered]:
    """Yield `(line, row)` or `(line, issue)` for each row of a source, in order.

    Lines count from 1: the line of the file for JSON Lines, JSON and CSV, the row of the table otherwise.

    Raises:
        DataError: the file cannot be opened or the disk fails while reading.
    """
    reader = {"jsonl": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet, "table": _table}[source.kind]
    last = 0
    try:
        for line, row in reader(source):
            last = line
            yield line, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"unreadable gzip data from here on ({error}); the file may be truncated"
        yield last + 1, RowIssue(source.where, last + 1, reason, "unreadable gzip")
    except OSError as error:
        raise DataError(f"cannot read '{source.where}': {error.strerror or error}.") from error
    else:
        if last == 0:
            yield 0, RowIssue(source.where, 0, "the file is empty", "empty file")


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path))
    return path.open("rb")


def _wrong_encoding(source: Source, stream: IO[bytes]) -> RowIssue | None:
    """An issue for the whole file if a byte-order mark says that it is not UTF-8."""
    start = cast("io.BufferedReader", stream).peek(2)[:2]
    if start in _TEXT_ENCODINGS:
        reason = f"the file is {_TEXT_ENCODINGS[start]}, expected UTF-8. Convert it with: iconv -t UTF-8"
        return RowIssue(source.where, 1, reason, "not UTF-8")
    return None


def _json_lines(source: Source) -> Iterator[Numbered]:
    assert source.path is not None
    with _open(source.path) as stream:
        if issue := _wrong_encoding(source, stream):
            yield 1, issue
            return
        for line, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            yield line, _parse_line(source, line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)


def _parse_line(source: Source, line: int, raw: bytes) -> Row | RowIssue:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        return RowIssue(source.where, line, reason, "not UTF-8")
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"not JSON: {getattr(error, 'msg', error)}{column}"
        return RowIssue(source.where, line, reason, "not JSON")
    return _object(source, line, value)


def _object(source: Source, line: int, value: object) -> Row | RowIssue:
    if isinstance(value, dict):
        return value
    reason = f"the row is a {type(value).__name__}, expected an object with keys such as 'chosen' and 'rejected'"
    return RowIssue(source.where, line, reason, "not an object")


def _json(source: Source) -> Iterator[Numbered]:
    """A `.json` file: an array of objects, else one object a line."""
    assert source.path is not None
    with _open(source.path) as stream:
        if issue := _wrong_encoding(source, stream):
            yield 1, issue
            return
        start = cast("io.BufferedReader", stream).peek(4096)[:4096]
        if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            is_array = False
        else:
            is_array = True
            yield from _array(source, stream)
    if not is_array:
        yield from _json_lines(source)


def _array(source: Source, stream: IO[bytes]) -> Iterator[Numbered]:
    """The elements of one JSON array, parsed from a window that grows only as far as one element needs."""
    # Bytes that are not UTF-8 become lone surrogates, which the conversion refuses row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    window = text.read(_CHUNK_CHARACTERS)
    position, line, want, ended = window.index("[") + 1, 1, _CHUNK_CHARACTERS, False
    line += window.count("\n", 0, position)
    while True:
        start = _BLANK.match(window, position).end()  # type: ignore[union-attr]
        line += window.count("\n", position, start)
        position = start
        if window[position : position + 1] == "]":
            return
        problem = "the array breaks off before its closing ']'"
        if position < len(window):
            try:
                value, end = decoder.raw_decode(window, position)
                if end < len(window) or ended:
                    yield line, _object(source, line, value)
                    line += window.count("\n", position, end)
                    position, want = end, _CHUNK_CHARACTERS
                    continue
            except (json.JSONDecodeError, RecursionError) as error:
                problem = f"not JSON: {getattr(error, 'msg', error)}"
                if _is_certain(error, window):
                    ended = True
        if ended:
            yield line, RowIssue(source.where, line, f"{problem}; the rest is not read", "not JSON")
            return
        more = text.read(want)
        ended, want = not more, 2 * want
        window, position = window[position:] + more, 0


def _is_certain(error: Exception, window: str) -> bool:
    """True if more text cannot mend a parse error (one near the window's end may only be cut off)."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return error.pos < len(window) - 16 and not error.msg.startswith("Unterminated")


def _csv(source: Source) -> Iterator[Numbered]:
    assert source.path is not None
    csv.field_size_limit(sys.maxsize)
    tabs = ".tsv" in [ending.lower() for ending in source.path.suffixes]
    with _open(source.path) as stream:
        if issue := _wrong_encoding(source, stream):
            yield 1, issue
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, delimiter="\t" if tabs else ",", strict=True)
        while True:
            line = reader.line_num + 1
            try:
                if reader.fieldnames and line == 1:  # asking for the names reads the header
                    line = reader.line_num + 1
                row = next(reader, None)
            except csv.Error as error:
                reason = f"not CSV: {error}; the rest is not read"
                yield line, RowIssue(source.where, line, reason, "not CSV")
                return
            if row is None:
                return
            yield line, _csv_row(source, line, cast("Row", row))


def _csv_row(source: Source, line: int, row: Row) -> Row | RowIssue:
    """Empty cells become missing keys; numbers and JSON messages get their types."""
    if None in cast("dict[object, object]", row):
        return RowIssue(source.where, line, "the row has more cells than the header", "not CSV")
    typed: Row = {}
    for key, cell in row.items():
        if cell is None or (cell == "" and key not in ("chosen", "rejected", "prompt")):
            continue
        typed[key] = cell
        if cell.startswith("["):
            typed[key] = _list_or_text(key, cell)
        elif _CSV_NUMBER.fullmatch(key):
            typed[key] = _number(cell)
    return typed


def _list_or_text(key: str, cell: str) -> object:
    """A list where one is meant: messages, or one of the list columns; else the text (code, say) as it is."""
    try:
        value: object = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    if not isinstance(value, list):
        return cell
    messages = all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    return value if messages or key in _CSV_LISTS else cell


def _number(cell: str) -> object:
    try:
        return int(cell)
    except ValueError:
        try:
            return float(cell)
        except ValueError:
            return cell


def _parquet(source: Source) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    assert source.path is not None
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as table:
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk, not the data
            raise
        reason = f"unreadable Parquet data from here on ({first_line(error)}); the file may be truncated"
        yield line + 1, RowIssue(source.where, line + 1, reason, "unreadable Parquet")


def _table(source: Source) -> Iterator[Numbered]:
    assert source.table is not None
    line = 0
    for batch in source.table.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for row in batch.to_pylist():
            line += 1
            yield line, row
