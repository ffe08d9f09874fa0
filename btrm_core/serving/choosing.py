"""What of the queue is computed at once.

Decides which sequences begin alike, that what begins alike is taken together, however far apart it stands in the
queue, and how much is taken: tokens are counted as the device computes them, common beginnings once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

LOOKED_AT = 2048
"""Works at the front of the queue among which is chosen."""
LITTLE = 8
"""A batch below this part of the budget is never made smaller."""


class Waiting(Protocol):
    """What waits: see `batching.Work`."""

    key: Hashable
    packed: list[bytes]


W = TypeVar("W", bound=Waiting)


def packed(ids: Sequence[int]) -> bytes:
    """Return ids as bytes that compare as the ids do, thousands at once.

    Args:
        ids: of one sequence.

    >>> packed([1, 300]) < packed([2]) < packed([2, 0]) < packed([256])
    True
    """
    return np.array(ids, dtype=">u4").tobytes()


def in_common(one: bytes, other: bytes) -> int:
    """Return how many tokens two packed sequences begin with together.

    Args:
        one: a sequence.
        other: another.

    >>> in_common(packed([7, 300, 5]), packed([7, 300, 6, 5]))
    2
    """
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // 4
    left, right = (np.frombuffer(ids, dtype=">u4", count=size // 4) for ids in (one, other))
    return int((left != right).argmax())


class TreeSize:
    """Tokens of a tree that sequences are added to, one after another."""

    def __init__(self) -> None:
        self._sorted: list[bytes] = []

    def add(self, ids: bytes) -> int:
        """Add a sequence; returns the tokens that it has in common with none before it.

        Args:
            ids: packed.
        """
        place = bisect_left(self._sorted, ids)
        shared = max((in_common(ids, near) for near in self._sorted[max(0, place - 1) : place + 1]), default=0)
        self._sorted.insert(place, ids)
        return len(ids) // 4 - shared


def together(batch: Sequence[Waiting]) -> list[int]:
    """One number per sequence, equal where sequences begin alike.

    Works of one key do. So do neighbours in sorted order that share at least half of the shorter one: several responses
    to one prompt, sent by a client that does not say what the prompt is, or turns of one conversation.

    Args:
        batch: works that may be computed at once.

    >>> class Asked:
    ...     def __init__(self, key, *sequences):
    ...         self.key, self.packed = key, [packed(ids) for ids in sequences]
    >>> together([Asked(None, [1, 2, 3, 4]), Asked("a", [9, 9]), Asked(None, [1, 2, 3, 5]), Asked("a", [9, 8, 1, 1])])
    [0, 1, 0, 1]
    """
    keys = [work.key for work in batch for _ in work.packed]
    sequences = [ids for work in batch for ids in work.packed]
    groups = [0] * len(sequences)
    of_key: dict[Hashable, int] = {}
    before, group, number = b"", 0, itertools.count()
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        ids, key = sequences[i], keys[i]
        half = -(-min(len(before), len(ids)) // 8) * 4
        if not half or before[:half] != ids[:half]:
            group = next(number) if key is None or key not in of_key else of_key[key]
        if key is not None:
            of_key.setdefault(key, group)
        before, groups[i] = ids, group
    return groups


def chosen(waiting: Iterable[W], budget: int) -> list[W]:
    """Return what to compute next.

    The oldest work with all that begins like it, then the oldest of the rest, and so on. Once half of what waits is
    taken, the rest is left: it is computed while the answers go out and those who waited for them ask again, so that
    neither they nor the device stand still.

    Args:
        waiting: the queue, oldest first.
        budget: tokens of a batch; a single work may be larger.
    """
    costs = list(_costs(list(itertools.islice(waiting, LOOKED_AT))))
    enough = max(sum(tokens for _, tokens, _ in costs) / 2, budget / LITTLE)
    taken: list[W] = []
    used = 0
    for work, tokens, begins in costs:
        if taken and (used + tokens > budget or (begins and used >= enough)):
            break
        taken.append(work)
        used += tokens
    return taken


def _costs(waiting: Sequence[W]) -> Iterator[tuple[W, int, bool]]:
    """Works, those that begin alike one after another; the tokens each adds, and whether it is the first of a kind."""
    groups: dict[int, list[W]] = {}
    numbers = iter(together(waiting))
    for work in waiting:
        first, *_ = [next(numbers) for _ in work.packed]
        groups.setdefault(first, []).append(work)
    for works in groups.values():
        tree = TreeSize()
        for place, work in enumerate(works):
            yield work, sum(tree.add(ids) for ids in work.packed), place == 0
