"""Pairs to tokens, chunk by chunk, in one process or several.

The chunks are fixed and come out in their order, so the result does not depend on the number of processes.
What becomes of them is `encoded`'s decision, what the ids of a conversation are is `chat`'s.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.packing import TokenGroup, share

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat, EncodedGroup
    from btrm_core.data import PairData

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
    results = chat.encode_groups([(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows], max_length)
    kept: list[tuple[int, dict[str, Any], TokenGroup]] = []
    chunk = Chunk({}, np.empty(0, np.int32), np.zeros(1, np.int32), len(rows), 0, 0, 0, [], 0, 0)
    for index, (row, result) in enumerate(zip(rows, results, strict=True), start):
        cut = result.dropped_turns > 0 or result.cut_characters > 0
        if problem := _problem(result, cut):
            chunk.dropped.append((problem, row["id"]))
            continue
        group = share(result.sequences)
        kept.append((index, row, group))
        chunk.truncated += cut
        chunk.dropped_turns += result.dropped_turns
        chunk.cut_characters += result.cut_characters
        chunk.longest = max(chunk.longest, group.shared + max(group.tails))
        chunk.with_margin += row["margin"] is not None
    chunk.columns = {
        "index": np.array([index for index, _, _ in kept], np.int64),
        "id": [row["id"] for _, row, _ in kept],
        "subset": [row["subset"] for _, row, _ in kept],
        "shared": np.array([group.shared for _, _, group in kept], np.int32),
        "chosen": np.array([group.tails[0] for _, _, group in kept], np.int32),
        "rejected": np.array([group.tails[1] for _, _, group in kept], np.int32),
        "margin": np.array([row["margin"] or 0.0 for _, row, _ in kept], np.float32),
        "weight": np.array([row["weight"] for _, row, _ in kept], np.float32),
        "probability": np.array([row["probability"] for _, row, _ in kept], np.float32),
        "group": np.array([row["group"] for _, row, _ in kept], np.int64),
        **_names(kept),
    }
    if kept:
        chunk.tokens = np.concatenate([group.tokens for _, _, group in kept])
        chunk.offsets = np.cumsum([0, *(len(group.tokens) for _, _, group in kept)], dtype=np.int32)
    return chunk


def _names(kept: list[tuple[int, dict[str, Any], TokenGroup]]) -> dict[str, NDArray[np.uint64]]:
    """A number for each of the two sequences, equal for equal ids: pairs of one row find what they have in common."""
    names = [[_name(ids) for ids in group.sequences] if row["group"] else [0, 0] for _, row, group in kept]
    names_P2 = np.array(names, np.uint64).reshape(-1, 2)
    return {"chosen_name": names_P2[:, 0], "rejected_name": names_P2[:, 1]}


def _name(ids: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "little")


def _problem(result: EncodedGroup, cut: bool) -> str | None:
    """Why a pair cannot be trained on, in words fit for counting; None if it can."""
    if result.error:
        return result.error
    if result.sequences[0] == result.sequences[1]:
        return "chosen and rejected are the same tokens" + (" after cutting" if cut else "")
    return None


def encoded_chunks(data: PairData, chat: ChatFormat, max_length: int, workers: int) -> Iterator[Chunk]:
    """Yield the encoded chunks in order, made by up to `workers` processes a few chunks ahead of the reader."""
    borders = [(start, start + CHUNK_PAIRS) for start in range(0, len(data), CHUNK_PAIRS)]
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


_worker: tuple[PairData, ChatFormat, int] | None = None


def _start_worker(data: PairData, chat: ChatFormat, max_length: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (data, chat, max_length)


def _work(start: int, stop: int) -> Chunk:
    assert _worker is not None
    return _encode_chunk(*_worker, start, stop)
