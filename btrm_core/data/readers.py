"""Reads rows one after the other, each with its line, without ever holding a whole file.

What cannot be read is yielded in the row's place as a `RowIssue`; a file that breaks off (packed and truncated, a
broken array) gives the rows before the break and one issue for the rest.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from btrm_core.data.inputs.streams import Unpacked, opened
from btrm_core.data.inputs.tables import BATCH_ROWS, arrow_rows, parquet_rows, table_rows
from btrm_core.data.issues import RowIssue
from btrm_core.data.shapes.values import RowError
from btrm_core.errors import DataError

if TYPE_CHECKING:
    from btrm_core.data.sources import Source

__all__ = ["BATCH_ROWS", "parse_json_line", "read_rows"]

Row = dict[str, Any]
Numbered = tuple[int, "Row | RowIssue"]

_CHUNK_CHARACTERS = 1 << 20
_NO_LINES = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*\{|\[[ \t]*\r?\n|\{[ \t]*\r?\n)")
"""How an array or an object over several lines begins, in a file whose name promises an object a line."""
_BLANK = re.compile(r"[\s,]*")
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_DELIMITERS = ",\t;|"
_KEPT_EMPTY = ("chosen", "rejected", "prompt")


def read_rows(source: Source) -> Iterator[Numbered]:
    """Yield `(line, row)` or `(line, issue)` for each row of a source, in order; of a slice, for its rows.

    Lines count from 1: the line of the file for JSON Lines, JSON and CSV (rows of one line are counted on from there),
    the row of the table otherwise.

    Args:
        source: where the rows are; it is read again from its beginning if a slice needs the number of all rows.

    Yields:
        Line and row, or line and issue; for a source without a row, line 0 and an issue that says so.

    Raises:
        DataError: the file cannot be opened or the disk fails while reading.
    """
    start, stop = _bounds(source)
    taken = False
    for numbered in itertools.islice(_all_rows(source), start, stop):
        taken = True
        yield numbered
    if not taken and _is_empty(source):
        reason = f"the slice {source.rows} holds no row" if source.rows else "the file is empty"
        yield 0, RowIssue(source.where, 0, reason, "empty slice" if source.rows else "empty file")


def _bounds(source: Source) -> tuple[int, int | None]:
    """Where the rows of a source begin and end, from 0; of one file of several, its part of their slice."""
    if source.rows is None:
        return 0, None
    whole = source.whole or (source,)
    start, stop = source.rows.bounds(lambda: sum(map(_count, whole)))
    first = sum(map(_count, itertools.takewhile(lambda other: other.path != source.path, source.whole)))
    return max(start - first, 0), None if stop is None else max(stop - first, 0)


def _is_empty(source: Source) -> bool:
    """Whether no row is in the slice of a source without a row; of several files, the first one tells."""
    if source.rows is None or not source.whole:
        return True
    start, stop = source.rows.bounds(lambda: sum(map(_count, source.whole)))
    is_first = source.path == source.whole[0].path
    return is_first and ((stop is not None and stop <= start) or start >= sum(map(_count, source.whole)))


@functools.lru_cache(maxsize=4096)
def _count(source: Source) -> int:
    return sum(1 for _ in _all_rows(source))


def _all_rows(source: Source) -> Iterator[Numbered]:
    try:
        if source.kind in ("parquet", "arrow", "table"):
            yield from {"parquet": parquet_rows, "arrow": arrow_rows, "table": table_rows}[source.kind](source)
        else:
            yield from _text_rows(source)
    except OSError as error:
        raise DataError(f"cannot read '{source.where}': {error.strerror or error}.") from error


def _text_rows(source: Source) -> Iterator[Numbered]:
    """The rows of a text file, and an issue at its end if its packed data breaks off."""
    assert source.path is not None
    last = 0
    with opened(source.path) as (stream, raw):
        if issue := _wrong_encoding(source, stream):
            yield 1, issue
            return
        reader = {"jsonl": _json_lines, "json": _json, "csv": _csv}[source.kind]
        if source.kind == "jsonl" and _NO_LINES.match(stream.peek(4096)[:4096]):
            reader = _json
        for line, row in reader(source, stream, raw):
            last = max(line, last + 1)  # where a line holds many rows, as in an array by pandas, they are counted
            yield last, replace(row, line=last) if isinstance(row, RowIssue) else row
        if raw.broken:
            reason = f"unreadable {raw.packing} data from here on ({raw.broken}); the file may be truncated"
            yield last + 1, RowIssue(source.where, last + 1, reason, f"unreadable {raw.packing}")


def _wrong_encoding(source: Source, stream: io.BufferedReader) -> RowIssue | None:
    """An issue for the whole file if a byte-order mark, or zeros between its letters, say that it is not UTF-8."""
    start = stream.peek(4)[:4]
    name = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), None)
    if name is None and 0 in start and len(start) == 4 and start.strip(b"\0"):
        name = "UTF-32" if start.count(0) == 3 else "UTF-16LE" if start[1] == 0 else "UTF-16BE"
    if name is None:
        return None
    reason = f"the file is {name}, expected UTF-8. Convert it with: iconv -f {name} -t UTF-8"
    return RowIssue(source.where, 1, reason, "not UTF-8")


def parse_json_line(raw: bytes, line: int = 0) -> Any:
    """Return the value of one line of JSON.

    Args:
        raw: the bytes of the line.
        line: its number; a byte-order mark is taken off the first.

    Returns:
        The value that the line spells: of any type, not only an object.

    Raises:
        RowError: it is not UTF-8, not JSON, or an object has a key twice.
    """
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        text = text.rstrip().removesuffix(",")  # a line of an array
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        place = f"byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        raise RowError("not UTF-8", f"not UTF-8: {place}") from error
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RowError("not JSON", f"not JSON: {getattr(error, 'msg', error)}{column}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise RowError("key given twice", f"an object has the key {twice[:40]!r} twice")
    return made


def _json_lines(source: Source, stream: Iterable[bytes], raw: Unpacked) -> Iterator[Numbered]:
    for line, text in enumerate(stream, start=1):
        if not text.strip() or (raw.broken and not text.endswith(b"\n")):  # broken in the middle of a line
            continue
        try:
            yield line, _row(source, line, parse_json_line(text, line))
        except RowError as error:
            yield line, RowIssue(source.where, line, str(error), error.kind)


def _row(source: Source, line: int, value: object) -> Row | RowIssue:
    if isinstance(value, dict):
        return value
    reason = f"the row is a {type(value).__name__}, expected an object with keys such as 'chosen' and 'rejected'"
    return RowIssue(source.where, line, reason, "not an object")


def _json(source: Source, stream: io.BufferedReader, raw: Unpacked) -> Iterator[Numbered]:
    """A `.json` file: arrays of objects, one object a line, objects over several lines, or one that holds the array."""
    start = stream.peek(4096)[:4096].removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from _array(source, stream, raw)
        return
    first = stream.readline()
    if start.startswith(b"{") and first.strip() and not first.rstrip().endswith(b"}"):
        yield from _objects(source, first + stream.read(), raw)
        return
    alone = not stream.peek(1)
    for line, row in _json_lines(source, itertools.chain([first], stream), raw):
        rows = _inner_rows(row) if alone and isinstance(row, dict) else None
        yield from ((line, _row(source, line, inner)) for inner in rows) if rows else [(line, row)]


def _objects(source: Source, content: bytes, raw: Unpacked) -> Iterator[Numbered]:
    """Objects written over several lines each, one after another; read at once."""
    text = content.decode("utf-8-sig", "surrogateescape")
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position, line, made = 0, 1, 0
    while (start := _BLANK.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            if not raw.broken:
                reason = f"not JSON: {getattr(error, 'msg', error)}; the rest is not read"
                yield line, RowIssue(source.where, line, reason, "not JSON")
            return
        made += 1
        alone = made == 1 and not text[position:].strip()
        rows = _inner_rows(value) if alone and isinstance(value, dict) else None
        yield from ((line, _row(source, line, inner)) for inner in rows or [value])
        line += text.count("\n", start, position)


def _inner_rows(value: Row) -> list[Any] | None:
    """The rows in an object that is no row itself ({"version": 1, "data": [...]}): its only list of objects."""
    if columns := _columns(value):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
    inner = lists[0] if len(lists) == 1 else []
    return inner if inner and not ({"role", "from"} & set(inner[0]) or {"prompt", "question"} & set(value)) else None


def _columns(value: Row) -> list[list[Any]] | None:
    """The columns of a table written by columns ({"prompt": ["q", "r"], ...}, or pandas' {"0": ..., "1": ...})."""
    cells = list(value.values())
    if len(cells) < 2:
        return None
    if all(isinstance(cell, dict) and list(cell) == list(cells[0]) for cell in cells):
        return [list(cell.values()) for cell in cells] if cells[0] and all(map(str.isdecimal, cells[0])) else None
    if not all(isinstance(cell, list) and len(cell) == len(cells[0]) > 1 for cell in cells):
        return None
    is_one_row = all(isinstance(item, dict) for cell in cells for item in cell)  # of messages
    return None if is_one_row else cells


def _array(source: Source, stream: io.BufferedReader, raw: Unpacked) -> Iterator[Numbered]:
    """The elements of JSON arrays, parsed from a window that grows only as far as one element needs."""
    # Bytes that are not UTF-8 become lone surrogates, which the conversion refuses row by row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    window = text.read(_CHUNK_CHARACTERS)
    position, line, want, ended = window.index("[") + 1, 1, _CHUNK_CHARACTERS, False
    line += window.count("\n", 0, position)
    inside = True
    while True:
        start = _BLANK.match(window, position).end()  # type: ignore[union-attr]
        line += window.count("\n", position, start)
        position = start
        here = window[position : position + 1]
        if here and here == ("]" if inside else "["):  # another array may follow
            inside, position = not inside, position + 1
            continue
        problem = "the array breaks off before its closing ']'"
        if here and not inside:
            problem, ended = "something follows the array's closing ']'", True
        elif here:
            try:
                value, end = decoder.raw_decode(window, position)
                if end < len(window) or ended:
                    yield line, _row(source, line, value)
                    line += window.count("\n", position, end)
                    position, want = end, _CHUNK_CHARACTERS
                    continue
            except RowError as error:
                problem, ended = str(error), True
            except (json.JSONDecodeError, RecursionError) as error:
                problem = f"not JSON: {getattr(error, 'msg', error)}"
                ended = ended or _is_certain(error, window)
        if ended:
            if (inside or here) and not raw.broken:
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


def _csv(source: Source, stream: io.BufferedReader, raw: Unpacked) -> Iterator[Numbered]:
    assert source.path is not None
    csv.field_size_limit(sys.maxsize)
    tabs = ".tsv" in [ending.lower() for ending in source.path.suffixes]
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline()
    named = re.fullmatch(r"sep=(.)[\r\n]*", first)  # what Excel is told
    wanted = named.group(1) if named else "\t" + _DELIMITERS if tabs else _DELIMITERS
    delimiter = next((mark for mark in wanted if mark in first), wanted[0])
    reader = csv.reader(itertools.chain(["\n" if named else first], text), delimiter=delimiter, strict=True)
    header: list[str] = []
    held: Numbered | None = None  # the last row, which may be half a row where the data breaks off
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if held:
                yield held
            if not raw.broken:
                yield line, RowIssue(source.where, line, f"not CSV: {error}; the rest is not read", "not CSV")
            return
        if cells is None:
            if held and not raw.broken:
                yield held
            return
        if held:
            yield held
            held = None
        if header and cells:
            held = line, _csv_row(source, line, header, cells)
        elif cells:
            header = [name.strip() or f"column {place}" for place, name in enumerate(cells, start=1)]
            twice = [name for name, number in Counter(header).items() if number > 1 and name]
            if twice:
                reason = f"the header names the column {twice[0]!r} twice; nothing is read"
                yield line, RowIssue(source.where, line, reason, "column named twice")
                return


def _csv_row(source: Source, line: int, header: list[str], cells: list[str]) -> Row | RowIssue:
    """A row without its empty cells; what a cell means is the conversion's to say."""
    if len(cells) > len(header):
        return RowIssue(source.where, line, "the row has more cells than the header", "not CSV")
    return {key: cell for key, cell in zip(header, cells, strict=False) if cell or key in _KEPT_EMPTY}
