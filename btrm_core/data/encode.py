"""Pairs to trees of tokens, chunk by chunk, in one process or several.

Decides which pairs are one group: those of one prompt, wherever they are in the data. The pairs are put into the order
of their prompts and encoded in fixed chunks that come out in their order, so the result does not depend on the number
of processes, and no more than some chunks are ever in memory. A prompt with more pairs than a chunk holds becomes
several groups. The responses to a prompt are encoded together: one prompt for all of them, cut alike if it must be cut.
What becomes of the chunks is `store`'s decision, what the ids of a conversation are is `chat`'s.

Shape letters: P pairs, G groups, K distinct conversations of a group.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.chat import spare
from btrm_core.errors import DataError
from btrm_core.packing import Tree, grow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from btrm_core.chat import ChatFormat, EncodedResponses
    from btrm_core.data.convert import Message
    from btrm_core.data.pairs import PairData

    IntArray = NDArray[np.int64]

CHUNK_PAIRS = 1024


_CHUNKS_PER_WORKER = 4
"""A further process takes some seconds to start; for fewer chunks it would not pay."""


@dataclass
class Chunk:
    """The groups and pairs of one chunk, and what was cut or dropped.

    Attributes:
        groups: the tree of each group's distinct conversations.
        pairs_G: how many pairs each group has.
        pairs: a dictionary per pair: its values in the Arrow file, `group` counted within the chunk.
        given: pairs that went in.
        truncated: pairs whose prompt was cut, by `dropped_turns` messages and `cut_characters` in all.
        dropped: (reason, pair id) of the pairs that cannot be trained on.
        longest: tokens of the longest sequence.
        pair_tokens: tokens of both sides of every pair, what is shared counted each time.
        with_margin: pairs that carry a margin.
        altered: (difference, pair id) of the pairs whose messages the template does not write as they are.
    """

    groups: list[Tree] = field(default_factory=list)
    pairs_G: list[int] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0
    truncated: int = 0
    dropped_turns: int = 0
    cut_characters: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)
    longest: int = 0
    pair_tokens: int = 0
    with_margin: int = 0
    altered: list[tuple[str, str]] = field(default_factory=list)

    def add(self, pairs: Iterable[_Kept]) -> None:
        """Add the pairs of one group, if there are any.

        Args:
            pairs: the pairs that are kept; equal conversations are stored once.
        """
        kept = list(pairs)
        if not kept:
            return
        places: dict[bytes, int] = {}
        sequences: list[NDArray[np.int32]] = []
        for pair in kept:
            sides = []
            for sequence in (pair.chosen, pair.rejected):
                place = places.setdefault(sequence.tobytes(), len(sequences))
                if place == len(sequences):
                    sequences.append(sequence)
                sides.append(place)
                self.longest = max(self.longest, len(sequence))
                self.pair_tokens += len(sequence)
            values = {"group": len(self.groups), "chosen": sides[0], "rejected": sides[1]}
            self.pairs.append({**pair.values, **values})
        self.groups.append(grow(sequences))
        self.pairs_G.append(len(kept))


@dataclass
class _Kept:
    """A pair that can be trained on: the ids of its sides, and its other values."""

    chosen: NDArray[np.int32]
    rejected: NDArray[np.int32]
    values: dict[str, Any]


@dataclass(frozen=True)
class _Answers:
    """The responses to a prompt: ids or an error of each, and what the template changed in their conversations."""

    encoded: EncodedResponses
    ids: dict[str, NDArray[np.int32]]
    errors: dict[str, str]
    altered: dict[str, str]


def _encode_chunk(data: PairData, index_P: IntArray, chat: ChatFormat, max_length: int, start: int, stop: int) -> Chunk:
    """Encode the pairs from `start` up to `stop` (exclusive) of data in the order of its prompts."""
    rows = data.rows(start, stop)
    wanted: dict[Any, tuple[list[Message], dict[str, None]]] = {}
    keys = [_key(row["prompt"]) for row in rows]
    other_keys = [
        _key(row["rejected_prompt"]) if row["rejected_prompt"] else key for key, row in zip(keys, rows, strict=True)
    ]
    for key, other, row in zip(keys, other_keys, rows, strict=True):
        wanted.setdefault(key, (row["prompt"], {}))[1][row["chosen"]] = None
        wanted.setdefault(other, (row["rejected_prompt"], {}))[1][row["rejected"]] = None
    answers = dict(zip(wanted, _answers(chat, wanted.values(), max_length), strict=True))
    chunk = Chunk(given=len(rows))
    hash_P = data.prompt_hash_P[start:stop]
    borders = [0, *(np.flatnonzero(np.diff(hash_P)) + 1).tolist(), len(rows)]
    for first, last in itertools.pairwise(borders):
        kept: list[_Kept] = []
        for _, unit in itertools.groupby(range(first, last), lambda i: rows[i]["group"] or -i - 1):
            numbered = [(int(index_P[start + i]), rows[i], (answers[keys[i]], answers[other_keys[i]])) for i in unit]
            kept += _taken(chunk, numbered)
        chunk.add(kept)
    return chunk


def _key(prompt: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in prompt)


def _answers(
    chat: ChatFormat, wanted: Iterable[tuple[list[Message], dict[str, None]]], max_length: int
) -> Iterator[_Answers]:
    """Encode the responses to each prompt together; a bad one costs the others nothing."""
    asked = [(prompt, list(responses)) for prompt, responses in wanted]
    for (prompt, responses), result in zip(asked, chat.encode_groups(asked, max_length), strict=True):
        errors: Sequence[str | None] = (result.error,) * len(responses)
        if result.error and len(responses) > 2:
            result, errors = spare(chat, prompt, responses, max_length)
        failed = {response: error for response, error in zip(responses, errors, strict=True) if error}
        good = [response for response in responses if response not in failed]
        altered = {response: what for response, what in zip(good, result.altered, strict=False) if what}
        found = (np.array(sequence, dtype=np.int32) for sequence in result.sequences)
        yield _Answers(result, dict(zip(good, found, strict=True)), failed, altered)


def _taken(chunk: Chunk, rows: Sequence[tuple[int, dict[str, Any], tuple[_Answers, _Answers]]]) -> list[_Kept]:
    """Keep the pairs of one row of the data that can be trained on, which weigh as much as all; count what was cut."""
    taken: list[_Kept] = []
    for index, row, (better, worse) in rows:
        sides = [better.encoded] if worse is better else [better.encoded, worse.encoded]
        cut = any(side.dropped_turns or side.cut_characters for side in sides)
        problem = better.errors.get(row["chosen"]) or worse.errors.get(row["rejected"])
        if problem is None and np.array_equal(better.ids[row["chosen"]], worse.ids[row["rejected"]]):
            problem = "chosen and rejected are the same tokens" + (" after cutting" if cut else "")
        if problem:
            chunk.dropped.append((problem, row["id"]))
            continue
        values = {
            "index": index,
            "id": row["id"],
            "subset": row["subset"],
            "margin": row["margin"] or 0.0,
            "weight": row["weight"],
            "probability": row["probability"],
            "ranking": row["group"],
        }
        taken.append(_Kept(better.ids[row["chosen"]], worse.ids[row["rejected"]], values))
        chunk.truncated += cut
        chunk.dropped_turns += sum(side.dropped_turns for side in sides)
        chunk.cut_characters += sum(side.cut_characters for side in sides)
        chunk.with_margin += row["margin"] is not None
        if altered := better.altered.get(row["chosen"]) or worse.altered.get(row["rejected"]):
            chunk.altered.append((altered, row["id"]))
    whole = sum(row["weight"] for _, row, _ in rows) / (sum(pair.values["weight"] for pair in taken) or 1.0)
    for pair in taken:
        pair.values["weight"] *= whole
    return taken


def by_prompt(hash_P: NDArray[np.uint64]) -> IntArray:
    """The order that puts pairs of one prompt together, prompts as they first appear.

    Args:
        hash_P: the hash of every pair's prompt, uint64 [P].

    Returns:
        The indices of the pairs in that order, int64 [P]; pairs of one prompt keep theirs.

    >>> by_prompt(np.array([7, 3, 7, 1, 3], dtype=np.uint64)).tolist()
    [0, 2, 1, 4, 3]
    """
    _, first, prompt_P = np.unique(hash_P, return_index=True, return_inverse=True)
    return np.argsort(first[prompt_P], kind="stable")


def encoded_chunks(data: PairData, chat: ChatFormat, max_length: int, workers: int) -> Iterator[Chunk]:
    """Yield the encoded chunks in order, made by up to `workers` processes a few chunks ahead of the reader.

    Args:
        data: P pairs, in any order.
        chat: the chat format that gives their ids.
        max_length: tokens of the longest conversation that is not cut.
        workers: processes at most; few chunks are encoded in this one.

    Yields:
        The chunks, in the order of `by_prompt`; they are the same for any number of processes.

    Raises:
        DataError: an encoding process ended early.
    """
    index_P = by_prompt(data.prompt_hash_P)
    if (np.diff(index_P) != 1).any():
        data = data.select(index_P, "by prompt", data.issues)
    borders = _borders(data.prompt_hash_P, data.group_P())
    workers = min(workers, len(borders) // _CHUNKS_PER_WORKER)
    if workers <= 1:
        for start, stop in borders:
            yield _encode_chunk(data, index_P, chat, max_length, start, stop)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Not forked: a fork copies locks that the tokenizer's or torch's threads may hold, and hangs.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(data, index_P, chat, max_length))
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


def _borders(hash_P: NDArray[np.uint64], ranking_P: IntArray) -> list[tuple[int, int]]:
    """Where chunks begin and end: about every `CHUNK_PAIRS` pairs, between prompts unless one has more than that.

    A prompt with more pairs is cut, but never between the pairs of one ranking.

    >>> hashes = np.repeat(np.arange(3, dtype=np.uint64), [CHUNK_PAIRS - 1, 3, 3 * CHUNK_PAIRS])
    >>> _borders(hashes, np.zeros(len(hashes), dtype=np.int64))
    [(0, 1026), (1026, 2050), (2050, 4098)]
    """
    number = len(hash_P)
    ends = np.append(np.flatnonzero(np.diff(hash_P)) + 1, number)
    lone_P = (ranking_P[1:] == 0) | (ranking_P[1:] != ranking_P[:-1])
    cuts = np.append(np.flatnonzero(lone_P) + 1, number)
    borders, start = [], 0
    while start < number:
        stop = min(start + CHUNK_PAIRS, number)
        end = int(ends[np.searchsorted(ends, stop)])
        stop = end if end - start <= 2 * CHUNK_PAIRS else int(cuts[np.searchsorted(cuts, stop)])
        borders.append((start, stop))
        start = stop
    return borders


_worker: tuple[PairData, IntArray, ChatFormat, int] | None = None


def _start_worker(data: PairData, index_P: IntArray, chat: ChatFormat, max_length: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (data, index_P, chat, max_length)


def _work(start: int, stop: int) -> Chunk:
    assert _worker is not None
    return _encode_chunk(*_worker, start, stop)
