"""The two tables of stored tokens: what their columns are, how chunks are written and counted, and columns read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

    from btrm_core.data.encode import Chunk, Chunks

    IntArray = NDArray[np.int64]

LISTS = ("tokens", "edges", "leaf")
_KINDS_KEPT, _EXAMPLES_KEPT = 20, 5
NUMBERS = {
    "index": "int64",
    "group": "int64",
    "chosen": "int32",
    "rejected": "int32",
    "margin": "float32",
    "weight": "float32",
    "probability": "float32",
    "ranking": "int64",
}


def record_batches(
    chunk: Chunk, groups_before: int, pairs_before: int
) -> tuple[pyarrow.RecordBatch, pyarrow.RecordBatch]:
    """The groups and the pairs of a chunk, numbered after those before it.

    Args:
        chunk: G groups and their pairs; at least one of each.
        groups_before: groups of all chunks before it.
        pairs_before: pairs of all chunks before it.

    Returns:
        A batch of G rows of `group_schema`, and one of `pair_schema` with a row per pair.
    """
    import pyarrow

    def lists(arrays: list[NDArray[np.int32]]) -> pyarrow.ListArray:
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(arrays)))

    first_pair = pairs_before + np.cumsum([0, *chunk.pairs_G[:-1]], dtype=np.int64)
    groups = [
        lists([tree.tokens for tree in chunk.groups]),
        lists([tree.edges.ravel() for tree in chunk.groups]),
        lists([tree.leaf for tree in chunk.groups]),
        pyarrow.array(first_pair),
    ]
    columns: dict[str, Any] = {name: [pair[name] for pair in chunk.pairs] for name in ("id", "subset")}
    columns |= {name: np.array([pair[name] for pair in chunk.pairs], kind) for name, kind in NUMBERS.items()}
    columns["group"] += groups_before
    return (
        pyarrow.RecordBatch.from_arrays(groups, schema=group_schema()),
        pyarrow.RecordBatch.from_pydict(columns, schema=pair_schema()),
    )


def group_schema() -> pyarrow.Schema:
    """A row per group: its tree, and the first of its pairs."""
    import pyarrow as pa

    return pa.schema([*((name, pa.list_(pa.int32())) for name in LISTS), ("first_pair", pa.int64())])


def pair_schema() -> pyarrow.Schema:
    """A row per pair: which conversations of which group it compares, and what the data says of it."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "subset")]
    return pa.schema([*texts, *((name, getattr(pa, kind)()) for name, kind in NUMBERS.items())])


def write_store(folder: Path, chunks: Chunks, max_length: int, progress: Callable[[int], None] | None) -> None:
    """Write groups.arrow, pairs.arrow and report.json.

    Args:
        folder: where they are written; must exist.
        chunks: the encoded chunks, in their order; closed at the end, however it comes.
        max_length: tokens of the longest conversation that was not cut, for the report.
        progress: called after every chunk with the number of pairs done so far.

    Raises:
        OSError: the disk is full or fails.
    """
    import pyarrow

    names = ("given", "encoded", "groups", "truncated", "dropped_turns", "cut_characters", "tokens", "pair_tokens")
    report: dict[str, Any] = dict.fromkeys((*names, "longest", "with_margin"), 0)
    report |= {"dropped": {}, "altered": {}, "examples": {}, "max_length": max_length}
    with (
        contextlib.closing(chunks),
        pyarrow.OSFile(str(folder / "groups.arrow"), "wb") as groups_file,
        pyarrow.OSFile(str(folder / "pairs.arrow"), "wb") as pairs_file,
        pyarrow.ipc.new_stream(groups_file, group_schema()) as groups,
        pyarrow.ipc.new_stream(pairs_file, pair_schema()) as pairs,
    ):
        for chunk in chunks:
            if chunk.groups:
                for writer, batch in zip(
                    (groups, pairs), record_batches(chunk, report["groups"], report["encoded"]), strict=True
                ):
                    writer.write_batch(batch)
            _count(report, chunk)
            if progress:
                progress(report["given"])
    (folder / "report.json").write_text(json.dumps(report))


def _count(report: dict[str, Any], chunk: Chunk) -> None:
    report["encoded"] += len(chunk.pairs)
    report["groups"] += len(chunk.groups)
    for name in ("given", "truncated", "dropped_turns", "cut_characters", "pair_tokens", "with_margin"):
        report[name] += getattr(chunk, name)
    report["tokens"] += sum(len(tree.tokens) for tree in chunk.groups)
    report["longest"] = max(report["longest"], chunk.longest)
    for kind, found in (("dropped", chunk.dropped), ("altered", chunk.altered)):
        for reason, name in found:
            if reason not in report[kind] and len(report[kind]) >= _KINDS_KEPT:
                reason = "other reasons"
            report[kind][reason] = report[kind].get(reason, 0) + 1
            examples = report["examples"].setdefault(reason, [])
            if len(examples) < _EXAMPLES_KEPT:
                examples.append(name)


class Lists:
    """A column of lists: views of what is mapped, a chunk at a time; nothing is copied before a row is built.

    Args:
        column: a column of lists of int32, none of them null.

    Attributes:
        chunks: the values of each chunk, one list after another, int32.
    """

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        self.chunks = [chunk.values.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[chunk])
        start, stop = self._offsets[chunk][row : row + 2]
        return cast("NDArray[np.int32]", self.chunks[chunk][start:stop])

    def flat(self) -> NDArray[np.int32]:
        """All values, one list after another, int32 [values]; a copy."""
        return np.concatenate([np.zeros(0, np.int32), *self.chunks])

    def sizes(self) -> IntArray:
        """The length of every list, int64 [lists]."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])


def numbers(table: pyarrow.Table, name: str) -> np.ndarray:
    """A numeric column in one piece (a copy: a few bytes a pair).

    Args:
        table: the table.
        name: the column.

    Returns:
        An array [rows] of the column's own type.
    """
    column = table[name].combine_chunks()
    return np.array(column.to_numpy(zero_copy_only=False))
