"""Pairs to tokens, chunk by chunk, in one process or several.

The chunks are fixed and come out in their order, so the result does not depend on the number of processes.
What becomes of them is `encoded`'s decision, what the ids of a conversation are is `chat`'s. The pairs of one row of
several responses are encoded together: one prompt for all of them, cut alike if it must be cut.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.chat import spare
from btrm_core.errors import DataError
from btrm_core.packing import common

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat, EncodedResponses
    from btrm_core.data.pairs import PairData

CHUNK_PAIRS = 1024


_CHUNKS_PER_WORKER = 4
"""A further process takes some seconds to start; for fewer chunks it would not pay."""


@dataclass
class Chunk:
    """The encoded pairs of one chunk, column by column, and what was cut or dropped.

    Attributes:
        columns: every column of the Arrow file but the tokens.
        tokens: the stored ids of all pairs, one after another.
        offsets: where each pair's ids begin; one more entry than pairs.
        given: pairs that went in.
        truncated: pairs whose prompt was cut, by `dropped_turns` messages and `cut_characters` in all.
        dropped: (reason, pair id) of the pairs that cannot be trained on.
        longest: tokens of the longest sequence.
        with_margin: pairs that carry a margin.
    """

    columns: dict[str, Any]
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int32]
    given: int
    truncated: int
    dropped_turns: int
    cut_characters: int
    dropped: list[tuple[str, str]]
    longest: int
    with_margin: int


def _encode_chunk(data: PairData, chat: ChatFormat, max_length: int, start: int, stop: int) -> Chunk:
    """Encode the pairs from `start` up to `stop` (exclusive)."""
    rows = data.rows(start, stop)
    units = [list(unit) for _, unit in itertools.groupby(range(len(rows)), lambda i: rows[i]["group"] or -i)]
    asked = [(rows[unit[0]]["prompt"], _responses([rows[i] for i in unit])) for unit in units]
    results = chat.encode_groups(asked, max_length)
    kept: list[_Kept] = []
    chunk = Chunk({}, np.empty(0, np.int32), np.zeros(1, np.int32), len(rows), 0, 0, 0, [], 0, 0)
    for unit, (prompt, responses), result in zip(units, asked, results, strict=True):
        errors: Sequence[str | None] = (result.error,) * len(responses)
        if result.error and len(responses) > 2:
            result, errors = spare(chat, prompt, responses, max_length)
        _take(chunk, kept, [(start + i, rows[i]) for i in unit], responses, result, errors)
    chunk.columns = {
        "index": np.array([pair.index for pair in kept], np.int64),
        "id": [pair.row["id"] for pair in kept],
        "subset": [pair.row["subset"] for pair in kept],
        "shared": np.array([pair.lengths[0] for pair in kept], np.int32),
        "chosen": np.array([pair.lengths[1] for pair in kept], np.int32),
        "rejected": np.array([pair.lengths[2] for pair in kept], np.int32),
        "margin": np.array([pair.row["margin"] or 0.0 for pair in kept], np.float32),
        "weight": np.array([pair.row["weight"] for pair in kept], np.float32),
        "probability": np.array([pair.row["probability"] for pair in kept], np.float32),
        "group": np.array([pair.row["group"] for pair in kept], np.int64),
        "chosen_place": np.array([pair.places[0] for pair in kept], np.int32),
        "rejected_place": np.array([pair.places[1] for pair in kept], np.int32),
    }
    if kept:
        chunk.tokens = np.concatenate([pair.tokens for pair in kept])
        chunk.offsets = np.cumsum([0, *(len(pair.tokens) for pair in kept)], dtype=np.int32)
    return chunk


@dataclass(frozen=True)
class _Kept:
    """A pair that can be trained on: its position, its row, its tokens and which responses of its prompt it has.

    The tokens are those that both sides begin with, those left of chosen, those left of rejected; `lengths` of each.
    """

    index: int
    row: dict[str, Any]
    tokens: NDArray[np.int32]
    lengths: tuple[int, int, int]
    places: tuple[int, int]


def _responses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The responses of some pairs to one prompt, each once."""
    return list(dict.fromkeys(row[side] for row in rows for side in ("chosen", "rejected")))


def _take(
    chunk: Chunk,
    kept: list[_Kept],
    rows: Sequence[tuple[int, dict[str, Any]]],
    responses: Sequence[str],
    result: EncodedResponses,
    errors: Sequence[str | None],
) -> None:
    """Keep the pairs of one prompt that can be trained on, which weigh as much as all, and count what was cut."""
    cut = result.dropped_turns > 0 or result.cut_characters > 0
    places = {response: place for place, response in enumerate(responses)}
    good = iter(result.sequences)
    sequences = [[] if error else next(good) for error in errors]
    taken: list[_Kept] = []
    for index, row in rows:
        chosen, rejected = places[row["chosen"]], places[row["rejected"]]
        problem = errors[chosen] or errors[rejected]
        if problem is None and sequences[chosen] == sequences[rejected]:
            problem = "chosen and rejected are the same tokens" + (" after cutting" if cut else "")
        if problem:
            chunk.dropped.append((problem, row["id"]))
            continue
        left, right = (np.array(sequences[place], dtype=np.int32) for place in (chosen, rejected))
        shared = common(left, right)
        tokens, lengths = np.concatenate([left, right[shared:]]), (shared, len(left) - shared, len(right) - shared)
        taken.append(_Kept(index, row, tokens, lengths, (chosen, rejected)))
        chunk.truncated += cut
        chunk.dropped_turns += result.dropped_turns
        chunk.cut_characters += result.cut_characters
        chunk.longest = max(chunk.longest, len(left), len(right))
        chunk.with_margin += row["margin"] is not None
    whole = sum(row["weight"] for _, row in rows) / (sum(pair.row["weight"] for pair in taken) or 1.0)
    kept += [replace(pair, row={**pair.row, "weight": pair.row["weight"] * whole}) for pair in taken]


def encoded_chunks(data: PairData, chat: ChatFormat, max_length: int, workers: int) -> Iterator[Chunk]:
    """Yield the encoded chunks in order, made by up to `workers` processes a few chunks ahead of the reader."""
    borders = _borders(data.group_P())
    workers = min(workers, len(borders) // _CHUNKS_PER_WORKER)
    if workers <= 1:
        for start, stop in borders:
            yield _encode_chunk(data, chat, max_length, start, stop)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Not forked: a fork copies locks that the tokenizer's or torch's threads may hold, and hangs.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(data, chat, max_length))
    try:
        running: deque[Any] = deque()
        for start, stop in borders:
            running.append(pool.submit(_work, start, stop))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "an encoding process ended early: memory may have run out, or a script starts btrm without "
            "an 'if __name__ == \"__main__\":' guard. Try fewer workers with --set data.workers=1."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _borders(group_P: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where chunks begin and end: about every `CHUNK_PAIRS` pairs, never between the pairs of one row.

    >>> _borders(np.repeat([0, 7, 0], [CHUNK_PAIRS - 1, 3, 1]))
    [(0, 1026), (1026, 1027)]
    """
    borders, start = [], 0
    while start < len(group_P):
        stop = min(start + CHUNK_PAIRS, len(group_P))
        while stop < len(group_P) and group_P[stop] and group_P[stop] == group_P[stop - 1]:
            stop += 1
        borders.append((start, stop))
        start = stop
    return borders


_worker: tuple[PairData, ChatFormat, int] | None = None


def _start_worker(data: PairData, chat: ChatFormat, max_length: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (data, chat, max_length)


def _work(start: int, stop: int) -> Chunk:
    assert _worker is not None
    return _encode_chunk(*_worker, start, stop)
