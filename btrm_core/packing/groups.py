"""Groups: K token sequences over one prompt, their common beginning stored once, and their lengths.

Shapes: P pairs or groups, K sequences of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

BLOCK = 128


@dataclass(frozen=True, eq=False)
class Group:
    """K finished sequences over one prompt, their common beginning stored once.

    Attributes:
        tokens: int32 ids laid out `[shared | tail_1 | ... | tail_K]`.
        shared: number of tokens that every sequence begins with.
        tails: number of remaining tokens of each sequence; 0 is allowed (the sequence is the
            shared part), as long as no whole sequence is empty.

    Raises:
        ValueError: the lengths do not add up, there is no sequence, or a sequence is empty.
    """

    tokens: NDArray[np.int32]
    shared: int
    tails: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.shared + sum(self.tails) != len(self.tokens):
            raise ValueError(
                f"a group of {len(self.tokens)} tokens cannot be {self.shared} shared tokens "
                f"and tails of {list(self.tails)}"
            )
        if not self.tails or self.shared + min(self.tails) < 1 or min(self.tails) < 0:
            raise ValueError(f"every sequence needs a token: shared {self.shared}, tails {list(self.tails)}")

    @property
    def sequences(self) -> list[NDArray[np.int32]]:
        """The K sequences as separate id arrays, in order."""
        sequences, start = [], self.shared
        for tail in self.tails:
            sequences.append(np.concatenate([self.tokens[: self.shared], self.tokens[start : start + tail]]))
            start += tail
        return sequences

    def unshared(self) -> list[Group]:
        """The same sequences as K groups of one, each with its whole sequence as its tail."""
        return [Group(tokens, 0, (len(tokens),)) for tokens in self.sequences]


def share(sequences: Sequence[Sequence[int] | NDArray[np.int32]]) -> Group:
    """Store sequences with their longest common beginning once.

    The comparison is on the tokens of the finished sequences, so it needs no knowledge of where the
    prompt ends and cannot be broken by a tokenizer that merges across that border.

    >>> group = share([[1, 2, 3, 4], [1, 2, 5]])
    >>> group.tokens.tolist(), group.shared, group.tails
    ([1, 2, 3, 4, 5], 2, (2, 1))

    Args:
        sequences: K lists of token ids, none empty.

    Raises:
        ValueError: there is no sequence, or one is empty.
    """
    if not sequences:
        raise ValueError("a group needs at least one sequence")
    arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    shared = min(len(array) for array in arrays)
    for array in arrays[1:]:
        differs = np.flatnonzero(arrays[0][:shared] != array[:shared])
        shared = int(differs[0]) if len(differs) else shared
    tails = [array[shared:] for array in arrays]
    tokens = np.concatenate([arrays[0][:shared], *tails])
    return Group(tokens, shared, tuple(len(tail) for tail in tails))


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
