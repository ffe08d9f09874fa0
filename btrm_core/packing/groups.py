"""How long groups of sequences are, and what they cost.

Shapes: P pairs or groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Lengths:
    """Token counts of groups `[shared | tail_1 | ... | tail_K]`.

    Attributes:
        shared_P: tokens that all sequences of a group begin with.
        tails_P: tokens of its tails together.
        squares_P: sum of the squares of its tails' tokens.
        longest_P: tokens of its longest sequence.
        count_P: K of every group.
    """

    shared_P: IntArray
    tails_P: IntArray
    squares_P: IntArray
    longest_P: IntArray
    count_P: IntArray

    @classmethod
    def of_pairs(cls, shared_P: ArrayLike, chosen_P: ArrayLike, rejected_P: ArrayLike) -> Lengths:
        """Groups of two: tokens in common, and those left of chosen and rejected."""
        shared, chosen, rejected = (np.asarray(x, dtype=np.int64) for x in (shared_P, chosen_P, rejected_P))
        longest = shared + np.maximum(chosen, rejected)
        return cls(shared, chosen + rejected, chosen**2 + rejected**2, longest, np.full(len(shared), 2))

    @classmethod
    def of_sequences(cls, shared_P: IntArray, group_S: IntArray, length_S: IntArray) -> Lengths:
        """Groups of any size from whole sequences: each one's group and number of tokens; no group may be empty."""
        tail_S, size = length_S - shared_P[group_S], len(shared_P)
        longest = np.zeros(size, dtype=np.int64)
        np.maximum.at(longest, group_S, length_S)
        tails, squares = (np.bincount(group_S, w, size).astype(np.int64) for w in (tail_S, tail_S**2))
        return cls(shared_P, tails, squares, longest, np.bincount(group_S, minlength=size))

    def tokens(self, share_prefix: bool = True) -> IntArray:
        """Tokens that each group adds to a packed row; without sharing, those of all its sequences."""
        return (1 if share_prefix else self.count_P) * self.shared_P + self.tails_P

    def cost(self, share_prefix: bool, hidden_size: int) -> FloatArray:
        """What each group costs in a packed row, in tokens.

        An attention score costs about 1 / (6 * width) of a token's matrix products, which matters for long sequences
        in small models only.
        """
        own = 1 if share_prefix else self.count_P
        scores = own * self.shared_P**2 / 2 + self.squares_P / 2 + self.shared_P * self.tails_P
        cost: FloatArray = self.tokens(share_prefix) + scores / (6.0 * hidden_size)
        return cost
