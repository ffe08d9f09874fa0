"""A file of rows as windows: so many rows as are read, scored and written together, and what becomes of them.

Decides how much is in memory at a time, whatever the size of the file. What two rows of a window begin with in common
is computed once, however far apart they stand in it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from btrm_core.data import Naming, RowIssue, opened, parquet_file_rows, parquet_length
from btrm_core.errors import DataError
from btrm_core.scoring.bulk.partial import Tally
from btrm_core.scoring.records import Record, read_record, record_of, written
from btrm_core.scoring.responses import Responses, Rewards
from btrm_core.scoring.scorer import Scorer

ROWS_AHEAD = 16
"""Rows of conversations that are read, arranged and written together."""


_CHARACTERS_PER_TOKEN = 4


_MOST_RECORDS = 512


PARQUET = b"PAR1"
"""How a Parquet file begins."""


@dataclass(frozen=True)
class Window:
    """Rows that are scored together.

    Attributes:
        rows: the number of each in the file, from 1, with its JSON, its columns, or why it has none.
        position: how many bytes of the file were read when the window was complete.
    """

    rows: Sequence[tuple[int, bytes | dict[str, Any] | RowIssue]]
    position: int

    @property
    def named(self) -> str:
        """Its rows, for people."""
        first, last = self.rows[0][0], self.rows[-1][0]
        return f"line {first}" if first == last else f"lines {first} to {last}"


@dataclass(frozen=True)
class Finished:
    """A window with its rewards.

    Attributes:
        lines: JSON Lines, one for each row.
        tally: what they are.
        units: rewards that were computed.
        position: that of the window.
    """

    lines: bytes
    tally: Tally
    units: int
    position: int


@dataclass(frozen=True)
class Windows:
    """The windows of a file; may be iterated again, by another process too.

    Attributes:
        path: JSON Lines, also packed, or Parquet.
        skip: rows at its beginning to leave out.
        tokens_per_batch: tokens of a row of the model's.
        naming: the user's own names of columns and roles.
    """

    path: Path
    skip: int
    tokens_per_batch: int
    naming: Naming = field(default_factory=Naming)

    def __iter__(self) -> Iterator[Window]:
        """Yield them in order, having read no further.

        Raises:
            DataError: the file cannot be read to its end; what came before was yielded.
        """
        if is_parquet(self.path):
            return self._gathered(self._table())
        return self._gathered(self._lines())

    def _gathered(self, rows: Iterable[tuple[int, Any, int, int]]) -> Iterator[Window]:
        """Windows of rows, each given with its number, itself, its characters and the position after it."""
        budget = ROWS_AHEAD * self.tokens_per_batch * _CHARACTERS_PER_TOKEN
        window: list[tuple[int, Any]] = []
        size = position = 0
        broken: DataError | None = None
        try:
            for number, row, characters, position in rows:
                window.append((number, row))
                size += characters
                if size >= budget or len(window) >= _MOST_RECORDS:
                    yield Window(window, position)
                    window, size = [], 0
        except DataError as error:
            broken = error
        if window:
            yield Window(window, position)
        if broken is not None:
            raise broken

    def _lines(self) -> Iterator[tuple[int, bytes, int, int]]:
        number = seen = 0
        with opened(self.path) as (lines, packed):
            if lines.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{self.path} is UTF-16, expected UTF-8. Convert it with: iconv -f UTF-16 -t UTF-8")
            problem: str | None = None
            try:
                for raw in lines:
                    if packed.broken and not raw.endswith(b"\n"):  # half a line
                        break
                    number += 1
                    if not raw.strip():
                        continue
                    seen += 1
                    if seen > self.skip:
                        yield number, raw, len(raw), packed.position
            except OSError as error:
                problem = str(error)
            if problem := problem or packed.broken:
                raise _cut_short(self.path, number, problem)

    def _table(self) -> Iterator[tuple[int, dict[str, Any] | RowIssue, int, int]]:
        size, length, number = self.path.stat().st_size, parquet_length(self.path), 0
        for number, row in parquet_file_rows(self.path):
            if isinstance(row, RowIssue) and row.kind == "unreadable Parquet":
                raise _cut_short(self.path, number - 1, row.reason)
            if number > self.skip:
                yield number, row, characters(row), size * number // length


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its first bytes.

    Args:
        path: an existing file.
    """
    with path.open("rb") as stream:
        return stream.read(len(PARQUET)) == PARQUET


def characters(value: Any) -> int:
    """About how many characters the JSON of a row has.

    Args:
        value: of JSON.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + characters(inner) for key, inner in value.items())
    return sum(map(characters, value)) if isinstance(value, list) else 8


def _cut_short(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"{path} cannot be read after line {number} ({problem}); the file may be cut short"
        + (". The rewards up to there are kept in the partial output" if number else "")
    )


class WindowScorer(Protocol):
    """What gives windows their rewards, in order."""

    @property
    def identity(self) -> str:
        """Changes when the rewards may."""

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a row."""

    def finished(self, windows: Windows) -> Iterator[Finished]:
        """Yield every window with its rewards, in order.

        Args:
            windows: of a file.
        """


class Alone:
    """One model, in this process.

    Args:
        scorer: the model.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.identity, self.tokens_per_batch = scorer.identity, scorer.tokens_per_batch

    def finished(self, windows: Windows) -> Iterator[Finished]:
        """Yield every window with its rewards, in order; the next one is read and encoded meanwhile.

        Args:
            windows: of a file.
        """
        return scored(self.scorer, windows, windows.naming)


def scored(scorer: Scorer, windows: Iterable[Window], naming: Naming) -> Iterator[Finished]:
    """Yield windows with their rewards, in order; the next one is read and encoded while the model computes.

    Args:
        scorer: the model.
        windows: one after another.
        naming: the user's own names of columns and roles.
    """
    waiting: list[tuple[Window, list[Record]]] = []
    broken: list[DataError] = []

    def groups() -> Iterator[Sequence[Responses]]:
        try:
            for window in windows:
                records = records_of(window, naming)
                waiting.append((window, records))
                yield groups_of(records)
        except DataError as error:  # what was read before is scored first
            broken.append(error)

    for rewards in scorer.stream(groups()):
        yield finished_window(*waiting.pop(0), rewards)
    if broken:
        raise broken[0]


def records_of(window: Window, naming: Naming) -> list[Record]:
    """Understand the rows of a window.

    Args:
        window: as read.
        naming: the user's own names of columns and roles.
    """
    records = []
    for number, row in window.rows:
        if isinstance(row, bytes):
            records.append(read_record(row, number, naming))
        elif isinstance(row, RowIssue):
            records.append(Record(number, {}, error=row.reason))
        else:
            records.append(record_of(row, number, naming))
    return records


def groups_of(records: Sequence[Record]) -> list[Responses]:
    """The prompts and responses of those records that can be scored.

    Args:
        records: of a window.
    """
    return [group for record in records if record.error is None for group in record.groups]


def finished_window(window: Window, records: Sequence[Record], rewards: Sequence[Rewards]) -> Finished:
    """Put rewards to the records of a window.

    Args:
        window: as read.
        records: of it.
        rewards: of `groups_of` these records.
    """
    values, tally, lines = iter(rewards), Tally(), []
    for record in records:
        parts = [next(values) for _ in record.groups] if record.error is None else []
        line = written(
            record,
            tuple(reward for part in parts for reward in part.rewards),
            tuple(error for part in parts for error in part.errors),
            any(part.truncated for part in parts),
        )
        tally.add(line)
        tally.noted.update(record.noted)
        lines.append(_encoded(line))
    units = sum(reward is not None for one in rewards for reward in one.rewards)
    return Finished(b"".join(lines), tally, units, window.position)


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return (json.dumps(line) + "\n").encode("ascii")
