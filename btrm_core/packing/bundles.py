"""Arranges sequences that are scored together: common beginnings once, rows filled up to a token budget.

Decides which sequences share a row when there is no optimiser step to keep to: groups as large as the budget allows,
the longest first. What a row looks like is `packing`'s; training has a planner of its own.

Shapes: S sequences, K sequences of one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from btrm_core.packing.groups import Group, share

KEYS_PER_TOKEN = 16
"""Keys of a row per token of its budget. Attention repeats the keys of a shared beginning for every response, so
without a limit hundreds of short responses to a long prompt would need little compute and much memory."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """A group and the places of its sequences among all that are scored."""

    group: Group
    members: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a packed row computes for it."""
        return len(self.group.tokens)

    @property
    def keys(self) -> int:
        """Keys of all its sequences: the shared ones counted once per sequence."""
        return self.group.shared * len(self.members) + sum(self.group.tails)


def bundles(sequences: Sequence[Sequence[int]], together: Sequence[Hashable], budget: int) -> list[Bundle]:
    """Group the sequences of equal `together`, and split groups that are larger than the budget.

    >>> found = bundles([[1, 2, 3], [7, 8], [1, 2, 4]], ["a", "b", "a"], budget=100)
    >>> [(bundle.members, bundle.group.shared) for bundle in found]
    [((0, 2), 2), ((1,), 2)]

    Args:
        sequences: S finished sequences, none empty.
        together: S keys; sequences of one key are expected to begin alike, which only the speed depends on.
        budget: tokens of a row. A single sequence over it gets a bundle of its own.
    """
    members_of: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(together):
        members_of[key].append(index)
    found = []
    for members in members_of.values():
        found += _split(sequences, members, budget)
    return found


def _split(sequences: Sequence[Sequence[int]], members: list[int], budget: int) -> list[Bundle]:
    """One bundle of all members if it is small enough, else several, each with the shared part again."""
    whole = Bundle(share([sequences[i] for i in members]), tuple(members))
    if len(members) == 1 or (whole.tokens <= budget and whole.keys <= KEYS_PER_TOKEN * budget):
        return [whole]
    shared = whole.group.shared
    parts: list[list[int]] = []
    tokens = keys = 0
    for index, tail in zip(members, whole.group.tails, strict=True):
        tokens, keys = tokens + tail, keys + shared + tail
        if not parts or tokens > budget or keys > KEYS_PER_TOKEN * budget:
            parts.append([])
            tokens = keys = shared + tail
        parts[-1].append(index)
    return [Bundle(share([sequences[i] for i in part]), tuple(part)) for part in parts]


def packed_rows(found: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    """Put bundles into rows of at most `budget` tokens, longest first, each into the first row with room."""
    rows: list[list[Bundle]] = []
    room: list[tuple[int, int]] = []
    for bundle in sorted(found, key=lambda bundle: -bundle.tokens):
        fits = (n for n, (tokens, keys) in enumerate(room) if bundle.tokens <= tokens and bundle.keys <= keys)
        number = next(fits, len(rows))
        if number == len(rows):
            rows.append([])
            room.append((budget, KEYS_PER_TOKEN * budget))
        rows[number].append(bundle)
        tokens, keys = room[number]
        room[number] = (tokens - bundle.tokens, keys - bundle.keys)
    return rows


def padded_rows(found: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    """Put every sequence on a line of its own, and lines of similar length into batches of at most `budget` tokens."""
    lines = [
        Bundle(alone, (member,))
        for bundle in found
        for alone, member in zip(bundle.group.unshared(), bundle.members, strict=True)
    ]
    rows: list[list[Bundle]] = []
    longest = 0
    for line in sorted(lines, key=lambda line: -line.tokens):
        if not rows or longest * (len(rows[-1]) + 1) > budget:
            rows.append([])
            longest = line.tokens
        rows[-1].append(line)
    return rows
