"""Arranges sequences that are scored together: common beginnings once, rows filled up to a token budget.

Decides which sequences share a row when there is no optimiser step to keep to: groups as large as the budget allows,
the longest first. What a row looks like is `packing`'s; training has a planner of its own.

Shapes: S sequences, K sequences of one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from btrm_core.packing.cuts import room, split
from btrm_core.packing.trees import Tree, grow, part


@dataclass(frozen=True, eq=False)
class Bundle:
    """A tree and the places of its sequences among all that are scored.

    Attributes:
        tree: K sequences.
        members: the place of each, from 0.
    """

    tree: Tree
    members: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a packed row computes for it."""
        return len(self.tree.tokens)


def bundles(sequences: Sequence[Sequence[int]], together: Sequence[Hashable], budget: int) -> list[Bundle]:
    """Make a tree of the sequences of equal `together`, and split trees that are larger than the budget.

    >>> found = bundles([[1, 2, 3], [7, 8], [1, 2, 4]], ["a", "b", "a"], budget=100)
    >>> [(bundle.members, bundle.tokens) for bundle in found]
    [((0, 2), 4), ((1,), 2)]

    Args:
        sequences: S finished sequences, none empty.
        together: S keys; sequences of one key are expected to begin alike, which only the speed depends on.
        budget: tokens of a row. A single sequence over it gets a bundle of its own.

    Returns:
        Bundles in which each of the S sequences is once, `members` being their places.
    """
    members_of: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(together):
        members_of[key].append(index)
    found = []
    for members in members_of.values():
        found += divided(Bundle(grow([sequences[i] for i in members]), tuple(members)), budget)
    return found


def divided(whole: Bundle, budget: int) -> list[Bundle]:
    """The bundle itself if a row has room for it, else several that repeat what they share.

    Args:
        whole: the bundle.
        budget: tokens of a row; a bundle of one sequence is kept even if it is longer.
    """
    if len(whole.members) == 1 or room(whole.tokens, whole.tree.keys) <= budget:
        return [whole]
    return [
        Bundle(part(whole.tree, places), tuple(whole.members[place] for place in places))
        for places in split(whole.tree, budget)
    ]


def packed_rows(found: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    """Put bundles into rows of at most `budget` tokens, longest first, each into the first row with room.

    Args:
        found: bundles in any order; one that is over the budget gets a row of its own.
        budget: tokens of a row.

    Returns:
        The bundles of every row; each bundle is in one.
    """
    rows: list[list[Bundle]] = []
    left: list[int] = []
    for bundle in sorted(found, key=lambda bundle: -bundle.tokens):
        needed = room(bundle.tokens, bundle.tree.keys)
        number = next((n for n, free in enumerate(left) if needed <= free), len(rows))
        if number == len(rows):
            rows.append([])
            left.append(budget)
        rows[number].append(bundle)
        left[number] -= needed
    return rows


def padded_rows(found: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    """Put every sequence on a line of its own, and lines of similar length into batches of at most `budget` tokens.

    Args:
        found: bundles in any order; each is taken apart into its sequences.
        budget: tokens of a batch, padding included; a longer line gets a batch of its own.

    Returns:
        The lines of every batch, as bundles of one sequence each, longest first.
    """
    lines = [
        Bundle(alone, (member,))
        for bundle in found
        for alone, member in zip(bundle.tree.unshared(), bundle.members, strict=True)
    ]
    rows: list[list[Bundle]] = []
    longest = 0
    for line in sorted(lines, key=lambda line: -line.tokens):
        if not rows or longest * (len(rows[-1]) + 1) > budget:
            rows.append([])
            longest = line.tokens
        rows[-1].append(line)
    return rows
