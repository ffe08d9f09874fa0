"""The rows of a source to pairs, with the account of what became of every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from btrm_core.data.convert import Pair, Reading, pairs_of
from btrm_core.data.formats import group_single_responses
from btrm_core.data.issues import IssueReport, RowIssue
from btrm_core.data.shapes.naming import Naming
from btrm_core.data.shapes.values import RowError
from btrm_core.data.shapes.view import RowView
from btrm_core.data.sources import Source
from btrm_core.errors import DataError


def read_pairs(
    source: Source,
    rows: Iterable[tuple[int, dict[str, Any] | RowIssue]],
    report: IssueReport,
    reading: Reading,
    *,
    strict: bool,
) -> Iterator[Pair]:
    """Yield the pairs of a source, and keep the report: every row is used or reported, and so is every key.

    Args:
        source: where the rows are from.
        rows: line and row, or what is wrong there.
        report: what is counted in; goes on as the pairs are taken.
        reading: how rows are read.
        strict: stop at the first bad row.

    Raises:
        DataError: `strict`, and a row is bad.
    """
    found: set[str] = set()
    named = _named(rows, reading.naming, found)
    inner = dataclasses.replace(reading, naming=reading.naming.of_renamed_rows)
    for line, number, row in group_single_responses(named):
        report.rows += number if line else 0
        issue = row if isinstance(row, RowIssue) else None
        if not isinstance(row, RowIssue):
            view = RowView(row, inner.naming)
            try:
                place: dict[str, Any] = {"name": source.name, "line": line, "subset": source.subset}
                pairs = pairs_of(view, inner, **place, group=report.rows)  # rows only grow
            except RowError as error:
                issue = RowIssue(source.where, line, str(error), error.kind, error.bad)
            else:
                report.pairs += len(pairs)
                report.used += number
                report.observe(source.where, line, view.unused, view.remarks, number)
                if reading.by_source:
                    pairs = [_of_source(pair, source.subset) for pair in pairs]
                yield from (_weighed(pair, source.weight) for pair in pairs)
        if issue:
            if strict and issue.bad:
                raise strict_error(issue)
            report.add(issue, number if line else 0)
    if report.rows:
        report.notes += [
            f"{source.where}: no row has the column '{column}' (mapped to '{name}')"
            for name, column in reading.naming.columns
            if column not in found and not (name == "margin" and ("-" in column or column == "scores"))
        ]


def _of_source(pair: Pair, source: str) -> Pair:
    return pair if pair.subset == source else dataclasses.replace(pair, subset=f"{source}/{pair.subset}")


def _named(
    rows: Iterable[tuple[int, dict[str, Any] | RowIssue]], naming: Naming, found: set[str]
) -> Iterator[tuple[int, dict[str, Any] | RowIssue]]:
    """Yield the rows under btrm's names, and note which of the user's columns there were."""
    for line, row in rows:
        if not isinstance(row, RowIssue) and naming.columns:
            renamed, taken = naming(row)
            found |= taken
            row = dict(renamed)
        yield line, row


def _weighed(pair: Pair, weight: float) -> Pair:
    return pair if weight == 1 else dataclasses.replace(pair, weight=pair.weight * weight)


def strict_error(issue: RowIssue) -> DataError:
    """Return the error of a run that wants every row to be sound.

    Args:
        issue: what is wrong with the row.
    """
    return DataError(f"{issue}. Mend the row, or train on the others without --strict.")
