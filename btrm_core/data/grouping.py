"""The pairs of one prompt, computed together: K responses are K sequences, however many pairs they make.

Decides: which pairs form a group. Pairs that were made from one row of scored responses stay together in a step and in
a row, as one batch element (InstructGPT, arXiv:2203.02155, section 3.5); every other pair is a group of its own.

Shapes: P pairs, G groups, S sequences of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from btrm_core.packing import Lengths, Tree, grow

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PairGroup:
    """One group, ready to be put into a row.

    Attributes:
        tokens: its sequences.
        pair_ids_P: its pairs.
        chosen_P: which sequence is the chosen one of each pair.
        rejected_P: which sequence is the rejected one.
        wins_S: of how many pairs a sequence is the chosen one, ties left out. With all pairs of a ranking this is the
            number of worse responses, so it orders them.
    """

    tokens: Tree
    pair_ids_P: IntArray
    chosen_P: IntArray
    rejected_P: IntArray
    wins_S: IntArray


class PairColumns(Protocol):
    """What groups are made from: the columns of encoded pairs, and each pair's tokens."""

    shared_P: NDArray[np.int32]
    chosen_P: NDArray[np.int32]
    rejected_P: NDArray[np.int32]
    weight_P: NDArray[np.float32]
    probability_P: NDArray[np.float32]
    group_P: IntArray
    chosen_place_P: NDArray[np.int32]
    rejected_place_P: NDArray[np.int32]

    def __len__(self) -> int: ...

    def group(self, index: int) -> Tree:
        """A pair's two sequences."""


class PairGroups:
    """The groups of encoded pairs, in their order.

    Attributes:
        starts_G: the first pair of each group, and one more entry: the number of pairs.
        weight_G: sum of the weights of a group's pairs, float64.
        lengths: tokens of the groups.
    """

    def __init__(self, pairs: PairColumns) -> None:
        self._pairs = pairs
        lone_P = pairs.group_P == 0
        first_P = np.ones(len(pairs), dtype=bool)
        first_P[1:] = lone_P[1:] | (pairs.group_P[1:] != pairs.group_P[:-1])
        self.starts_G = np.append(np.flatnonzero(first_P), len(pairs))
        self.weight_G = np.add.reduceat(pairs.weight_P.astype(np.float64), self.starts_G[:-1])
        self.lengths = self._lengths(np.cumsum(first_P) - 1)

    def __len__(self) -> int:
        return len(self.starts_G) - 1

    def pairs_of(self, groups: IntArray) -> IntArray:
        """The pairs of some groups, in their order."""
        return np.concatenate([np.arange(self.starts_G[g], self.starts_G[g + 1]) for g in groups])

    def group(self, index: int) -> PairGroup:
        """One group, its sequences in the order in which its pairs name them."""
        pairs, ids_P = self._pairs, np.arange(self.starts_G[index], self.starts_G[index + 1])
        if len(ids_P) == 1:
            tokens = pairs.group(int(ids_P[0]))
            chosen_P, rejected_P = np.array([0]), np.array([1])
        else:
            tokens, chosen_P, rejected_P = self._joined(ids_P)
        won_P = pairs.probability_P[ids_P] > 0.5
        wins_S = np.bincount(chosen_P[won_P], minlength=len(tokens.leaf))
        return PairGroup(tokens, ids_P, chosen_P, rejected_P, wins_S)

    def _joined(self, ids_P: IntArray) -> tuple[Tree, IntArray, IntArray]:
        """The sequences of several pairs, each once, and where those of each pair are."""
        pairs = self._pairs
        places: dict[int, int] = {}
        sequences: list[NDArray[np.int32]] = []
        for i in ids_P.tolist():
            own = int(pairs.chosen_place_P[i]), int(pairs.rejected_place_P[i])
            for place, sequence in zip(own, pairs.group(i).sequences, strict=True):
                if place not in places:
                    places[place] = len(sequences)
                    sequences.append(sequence)
        sides = (pairs.chosen_place_P[ids_P], pairs.rejected_place_P[ids_P])
        chosen_P, rejected_P = (np.array([places[int(place)] for place in side]) for side in sides)
        return grow(sequences), chosen_P, rejected_P

    def _lengths(self, group_of_P: IntArray) -> Lengths:
        """Tokens of every group, each response counted once; no token is read for it."""
        pairs = self._pairs
        if len(self) == len(pairs):
            return Lengths.of_pairs(pairs.shared_P, pairs.chosen_P, pairs.rejected_P)
        shared_P = pairs.shared_P.astype(np.int64)
        places_2P = np.concatenate([pairs.chosen_place_P, pairs.rejected_place_P])
        lengths_2P = np.concatenate([shared_P + pairs.chosen_P, shared_P + pairs.rejected_P])
        groups_2P = np.concatenate([group_of_P, group_of_P])
        order = np.lexsort((places_2P, groups_2P))
        places, groups, lengths = places_2P[order], groups_2P[order], lengths_2P[order]
        own = np.append(True, (places[1:] != places[:-1]) | (groups[1:] != groups[:-1]))
        shared_G = np.minimum.reduceat(shared_P, self.starts_G[:-1])
        return Lengths.of_sequences(shared_G, groups[own], lengths[own])
