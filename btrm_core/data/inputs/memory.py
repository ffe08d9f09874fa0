"""Rows that a program holds in memory: mappings, tables of pandas, Arrow and Polars, or a mapping of columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from btrm_core.data.inputs.tables import Numbered, batch_rows
from btrm_core.data.issues import RowIssue
from btrm_core.data.shapes.values import plain, shown


def memory_rows(rows: Iterable[Any], where: str) -> Iterator[Numbered]:
    """Yield each row with its number from 1; what is no row becomes an issue in its place.

    Args:
        rows: mappings (values of numpy and pandas are understood), or a table.
        where: what messages call them.

    Yields:
        Row counted from 1, and its plain values or what is wrong with it.
    """
    if hasattr(rows, "to_batches") or type(rows).__name__ == "RecordBatch":
        batches = rows.to_batches() if hasattr(rows, "to_batches") else [rows]
        yield from batch_rows(where, iter(batches), "Arrow")
        return
    for line, row in enumerate(_each(rows), start=1):
        try:
            made = plain(row)
        except RecursionError:
            made = "a row that holds itself"
        if isinstance(made, dict):
            yield line, made
        else:
            reason = f"the row is {shown(made)}, expected a mapping with keys such as 'chosen' and 'rejected'"
            yield line, RowIssue(where, line, reason, "not an object")


def _each(rows: Any) -> Any:
    if hasattr(rows, "to_dicts"):
        return rows.to_dicts()  # Polars
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        return rows.to_dict("records")
    if names := getattr(getattr(rows, "dtype", None), "names", None):  # a structured array of numpy
        return [dict(zip(names, cells, strict=True)) for cells in rows.tolist()]
    if isinstance(rows, Mapping):
        columns = list(rows.values())
        if columns and all(isinstance(column, list | tuple) and len(column) == len(columns[0]) for column in columns):
            return [dict(zip(rows, cells, strict=True)) for cells in zip(*columns, strict=True)]
        return [rows]
    return rows
