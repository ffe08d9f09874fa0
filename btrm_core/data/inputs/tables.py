"""Rows of Parquet files, Arrow files and `datasets` tables.

Decides: that a column nobody asked for never costs a row. Dates, times and durations become the numbers they are stored
as (Python's own cannot hold all of them, nor know every time zone), and columns of the type Json are decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrm_core.data.issues import RowIssue
from btrm_core.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

    from btrm_core.data.sources import Source

BATCH_ROWS = 1000
Row = dict[str, Any]
Numbered = tuple[int, "Row | RowIssue"]
Decode = Callable[[Any], Any]


def parquet_rows(source: Source) -> Iterator[Numbered]:
    """Yield the rows of a Parquet file.

    Args:
        source: a source with the path of a file.

    Yields:
        (row counted from 1, the row as Python values or what is wrong with it); of data that breaks off the rows
        before, and one issue.

    Raises:
        OSError: the file cannot be opened, or the disk fails while reading.
    """
    yield from parquet_file_rows(_path(source), source.where)


def parquet_file_rows(path: Path, where: str | None = None) -> Iterator[Numbered]:
    """Yield the rows of a Parquet file as they are, each with its number from 1, a batch at a time.

    Args:
        path: the file.
        where: what messages call it; None is its path.

    Yields:
        As `parquet_rows`.

    Raises:
        OSError: the file cannot be opened, or the disk fails while reading.
    """
    import pyarrow
    import pyarrow.parquet

    def batches() -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=BATCH_ROWS)

    yield from batch_rows(where or str(path), batches(), "Parquet")


def parquet_length(path: Path) -> int:
    """Return the number of rows of a Parquet file.

    Args:
        path: the file.

    Raises:
        DataError: it is none, or is cut short.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole Parquet file: {first_line(error)}") from error


def arrow_rows(source: Source) -> Iterator[Numbered]:
    """Yield the rows of an Arrow file, in the stream format (as `datasets` writes it) or the file format (Feather).

    Args:
        source: a source with the path of a file.

    Yields:
        As `parquet_rows`.

    Raises:
        OSError: the file cannot be opened, or the disk fails while reading.
    """
    import pyarrow

    def batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader = pyarrow.ipc.open_file(file)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                yield from pyarrow.ipc.open_stream(file)
            else:
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

    sliced = (
        batch.slice(start, BATCH_ROWS)
        for batch in batches(_path(source))
        for start in range(0, batch.num_rows, BATCH_ROWS)
    )
    yield from batch_rows(source.where, sliced, "Arrow")


def table_rows(source: Source) -> Iterator[Numbered]:
    """Yield the rows of a `save_to_disk` folder or of a Hub data set.

    Args:
        source: a source with a `datasets` table.

    Yields:
        As `parquet_rows`.

    Raises:
        OSError: the disk fails while reading.
    """
    assert source.table is not None
    tables = source.table.with_format("arrow").iter(batch_size=BATCH_ROWS)
    yield from batch_rows(source.where, (batch for table in tables for batch in table.to_batches()), "Arrow")


def _path(source: Source) -> Path:
    assert source.path is not None
    return source.path


def batch_rows(where: str, batches: Iterator[pyarrow.RecordBatch], name: str) -> Iterator[Numbered]:
    """Yield the rows of batches of Arrow.

    Args:
        where: what messages call their source.
        batches: the batches, in order.
        name: what they are stored as, for messages.

    Yields:
        As `parquet_rows`.

    Raises:
        OSError: the disk fails while reading.
    """
    import pyarrow

    line = 0
    try:
        for batch in batches:
            for row in _plain_rows(batch):
                line += 1
                if isinstance(row, dict):
                    yield line, row
                else:
                    yield line, RowIssue(where, line, f"unreadable row: {row}", f"unreadable {name} row")
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk, not the data
            raise
        reason = f"unreadable {name} data from here on ({first_line(error)}); the file may be truncated"
        yield line + 1, RowIssue(where, line + 1, reason, f"unreadable {name}")


def _plain_rows(batch: pyarrow.RecordBatch) -> Iterator[Row | str]:
    """The rows of a batch as Python values, or why a row has none."""
    columns = {field.name: (batch.column(i), _decoder(field.type)) for i, field in enumerate(batch.schema)}
    columns = {name: (_stored(column), decode) for name, (column, decode) in columns.items()}
    try:
        values = {name: column.to_pylist() for name, (column, _) in columns.items()}
    except (ValueError, ArithmeticError):  # a value that Python cannot hold, or text that is not UTF-8: row by row
        for index in range(batch.num_rows):
            try:
                yield _row({name: (column[index].as_py(), decode) for name, (column, decode) in columns.items()})
            except (ValueError, ArithmeticError) as error:
                yield first_line(error)
        return
    for index in range(batch.num_rows):
        try:
            yield _row({name: (values[name][index], decode) for name, (_, decode) in columns.items()})
        except ValueError as error:
            yield f"a column of the type Json holds no JSON ({error})"


def _row(cells: dict[str, tuple[Any, Decode | None]]) -> Row:
    return {name: value if decode is None else decode(value) for name, (value, decode) in cells.items()}


def _stored(column: Any) -> Any:
    """A column with dates, times, durations and decimals as the numbers or texts they are stored as, at any depth."""
    import pyarrow

    wanted = _storable(column.type)
    if wanted == column.type:
        return column
    try:
        return column.cast(wanted)
    except (pyarrow.ArrowException, NotImplementedError):
        return pyarrow.nulls(len(column))  # an interval, say: never text, so nothing that could be trained on


def _storable(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow as pa

    types = pa.types
    if types.is_date32(kind) or types.is_time32(kind):
        return pa.int32()
    if types.is_temporal(kind):
        return pa.int64() if not types.is_interval(kind) else pa.null()
    if types.is_decimal(kind):
        return pa.string()
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, _storable(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _storable(kind.value_type)
        return kind if inner == kind.value_type else pa.list_(inner)
    return kind


def _decoder(kind: pyarrow.DataType) -> Decode | None:
    """What turns the values of a type into what they mean: JSON where the type says so, at any depth."""
    import pyarrow as pa

    if isinstance(kind, getattr(pa, "JsonType", ())):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if pa.types.is_struct(kind):
        inner = {field.name: decode for field in kind if (decode := _decoder(field.type))}
        if inner:
            return lambda value: value and {k: inner[k](v) if k in inner else v for k, v in value.items()}
    elif pa.types.is_map(kind):
        of_item = _decoder(kind.item_type)
        return lambda value: value and {key: of_item(inner) if of_item else inner for key, inner in value}
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _decoder(kind.value_type)
        if item:
            return lambda value: value and [item(v) for v in value]
    return None
