"""From the lines of a finished partial output to the file that was asked for: plain, packed, or Parquet.

Decides: what is written while scoring is always lines of JSON, which an interrupted call can go on from; the asked form
is made of them at the end, a batch at a time. A Parquet file made of a Parquet file keeps the columns of that as they
are, with their types.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from btrm_core.data import PACKED
from btrm_core.files import flush_handle
from btrm_core.scoring.bulk.windows import is_parquet
from btrm_core.scoring.records import OWN_NAME, what_was_added

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000
Schema = dict[str, "pyarrow.DataType | None"]
"""Columns with their types; None where the values have none in common, so that they are written as JSON."""


def finish(lines: Path, source: Path, target: Path) -> None:
    """Put a whole output in its place.

    Args:
        lines: JSON Lines, one for each row of the source; gone afterwards.
        source: the input.
        target: the output. Its ending says what it is: `.parquet`, `.gz`, `.zst`, `.bz2`, `.xz`, else plain lines.

    Raises:
        OSError: the disk is full.
    """
    ending = target.suffix.lower()
    if ending != ".parquet" and ending not in PACKED:
        lines.replace(target)
        return
    made = target.with_name(target.name + ".making")
    try:
        if ending == ".parquet":
            _write_parquet(lines, source, made)
        else:
            with lines.open("rb") as plain, _packing(made, PACKED[ending]) as packed:
                shutil.copyfileobj(plain, packed, 1 << 20)
        with made.open("rb") as whole:
            flush_handle(whole.fileno())
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
    lines.unlink()


def _packing(path: Path, kind: str) -> IO[bytes]:
    if kind == "gzip":
        return gzip.GzipFile("", "wb", compresslevel=6, fileobj=path.open("wb"), mtime=0)  # type: ignore[return-value]
    if kind == "bzip2":
        return bz2.open(path, "wb")
    if kind == "xz":
        return lzma.open(path, "wb")
    import pyarrow

    stream: IO[bytes] = pyarrow.CompressedOutputStream(str(path), "zstd")
    return stream


def _write_parquet(lines: Path, source: Path, made: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with_columns = is_parquet(source)
    rows = _added if with_columns else _rows
    schema = _schema(lines, rows)
    own = pyarrow.parquet.read_schema(source) if with_columns else pyarrow.schema([])
    names = {name: f"{OWN_NAME}{name}" if name in own.names else name for name in schema}
    fields = [pyarrow.field(names[name], kind or pyarrow.string()) for name, kind in schema.items()]
    whole = pyarrow.schema([*own, *fields], own.metadata)
    with pyarrow.parquet.ParquetWriter(made, whole) as writer:
        batches = _batches(rows(lines))
        if not with_columns:
            for batch in batches:
                writer.write_table(pyarrow.table(_columns(batch, schema), whole))
            return
        with pyarrow.parquet.ParquetFile(source) as table:
            kept = table.iter_batches(batch_size=BATCH_ROWS)
            for columns, batch in zip(_of_equal_size(kept), batches, strict=True):
                writer.write_table(pyarrow.table([*columns, *_columns(batch, schema)], whole))


def _of_equal_size(batches: Iterator[Any]) -> Iterator[list[Any]]:
    """The columns of a table in batches of `BATCH_ROWS`, the last one smaller."""
    import pyarrow

    held: list[Any] = []
    for batch in batches:
        held.append(batch)
        while sum(part.num_rows for part in held) >= BATCH_ROWS:
            table = pyarrow.Table.from_batches(held)
            yield table.slice(0, BATCH_ROWS).columns
            held = table.slice(BATCH_ROWS).to_batches()
    if sum(part.num_rows for part in held):
        yield pyarrow.Table.from_batches(held).columns


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open("rb") as stream:
        for line in stream:
            yield json.loads(line)


def _added(lines: Path) -> Iterator[dict[str, Any]]:
    return map(what_was_added, _rows(lines))


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        yield batch


def _schema(lines: Path, rows: Callable[[Path], Iterator[dict[str, Any]]]) -> Schema:
    """The columns of all rows; the last of them are those that were added."""
    import pyarrow

    found: Schema = {}
    for batch in _batches(rows(lines)):
        for name in dict.fromkeys(name for row in batch for name in row):
            kind = _kind([row.get(name) for row in batch])
            found[name] = _common(found.get(name, pyarrow.null()), kind)
    added: dict[str, None] = {}
    own: set[str] = set()
    for row in rows(lines):
        last = list(row)[
            len(row) - len(what_was_added(row)) :
        ]  # what was added stands at the end, under its names there
        added |= dict.fromkeys(last)
        own |= row.keys() - set(last)
    kept = {name: kind for name, kind in found.items() if name not in added}
    return kept | {name: _reward_kind(name) if name not in own and found[name] else found[name] for name in added}


def _reward_kind(name: str) -> pyarrow.DataType:
    """The type of something that was added: rewards are float32."""
    import pyarrow

    types = {"rewards": pyarrow.list_(pyarrow.float32()), "truncated": pyarrow.bool_(), "error": pyarrow.string()}
    return types.get(name.removeprefix(OWN_NAME), pyarrow.float32())


def _kind(values: list[Any]) -> pyarrow.DataType | None:
    import pyarrow

    try:
        kind = pyarrow.array(values).type
        return kind if _has_columns(kind) else None
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        return None


def _has_columns(kind: pyarrow.DataType) -> bool:
    """False if an object without keys is in it, which Parquet cannot store."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return kind.num_fields > 0 and all(_has_columns(field.type) for field in kind)
    return not pyarrow.types.is_list(kind) or _has_columns(kind.value_type)


def _common(one: pyarrow.DataType | None, other: pyarrow.DataType | None) -> pyarrow.DataType | None:
    import pyarrow

    if one is None or other is None:
        return None
    try:
        parts = [pyarrow.schema([("x", kind)]) for kind in (one, other)]
        return pyarrow.unify_schemas(parts, promote_options="permissive").field(0).type
    except pyarrow.ArrowException:
        return None


def _columns(batch: list[dict[str, Any]], schema: Schema) -> list[pyarrow.Array]:
    import pyarrow

    columns = []
    for name, kind in schema.items():
        values = [row.get(name) for row in batch]
        if kind is None:
            values = [None if value is None else json.dumps(value) for value in values]
        columns.append(pyarrow.array(values, kind or pyarrow.string()))
    return columns
