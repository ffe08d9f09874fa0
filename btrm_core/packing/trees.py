"""The finished sequences of one prompt as a tree: what several of them begin with is there once.

Decides how sequences become a tree and how a tree is taken apart. It knows no rows and no models, and needs no torch.

Sorted sequences, walked one after another, give the tokens of their trie in depth-first order: each adds what it does
not have in common with the one before. An edge is a stretch of these tokens in which nothing branches and no sequence
ends. Equal sequences end at one edge; a sequence that others begin with ends at an edge that others go on from, and has
its reward there. Pairs, any number of responses, turns of one conversation judged at several depths: all are trees.

Shape letters: N tokens, E edges, K sequences of a tree.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IdArray = NDArray[np.int32]
    IntArray = NDArray[np.int64]

BLOCK = 128
"""What rows are rounded up to where kernels work in blocks of tokens."""

Ranges = tuple[tuple[int, int], ...]


class Stretch(NamedTuple):
    """Tokens that are computed as one attention run: an edge with the first edge that goes on from it, and so on.

    Attributes:
        start: its first token.
        stop: one past its last.
        prefix: the tokens before it on its path, as ranges in order, neighbours joined.
    """

    start: int
    stop: int
    prefix: Ranges


@dataclass(frozen=True, eq=False)
class Tree:
    """K token sequences as a trie in depth-first order.

    Attributes:
        tokens: int32 ids [N], edge after edge.
        edges: int32 [E, 3]: first token, one past the last token, and the edge it goes on from (-1: none). Parents come
            before their children, and everything below an edge directly after it.
        leaf: int32 [K]: the edge that each sequence ends at. Others may go on from it.

    Raises:
        ValueError: the edges do not cover the tokens, their order is not depth-first, there is no sequence, or an edge
            leads to none.
    """

    tokens: IdArray
    edges: IdArray
    leaf: IdArray

    def __post_init__(self) -> None:
        count, (start, stop, parent) = len(self.edges), self.edges.T
        if not len(self.leaf) or not count:
            raise ValueError("a tree needs at least one sequence of at least one token")
        borders = np.append(start, len(self.tokens))
        if start[0] != 0 or (stop != borders[1:]).any() or (stop <= start).any():
            raise ValueError(f"edges {self.edges.tolist()} do not cover {len(self.tokens)} tokens one after another")
        if self.leaf.min() < 0 or self.leaf.max() >= count:
            raise ValueError(f"sequences end at edges {self.leaf.tolist()}; expected edges 0 to {count - 1}")
        needed = np.zeros(count + 1, dtype=bool)  # the last entry takes the parent -1
        needed[self.leaf] = needed[parent] = True
        if not needed[:-1].all():
            raise ValueError(f"edge {int(np.argmin(needed))} leads to no sequence")
        _ = self.ends  # walks the tree, and so finds an order that is not depth-first

    @functools.cached_property
    def depths(self) -> IntArray:
        """Position of each edge's first token in the sequences through it [E]."""
        depths: list[int] = []
        stops = self.edges[:, 1].tolist()
        starts = self.edges[:, 0].tolist()
        for parent in self.edges[:, 2].tolist():
            depths.append(0 if parent < 0 else depths[parent] + stops[parent] - starts[parent])
        return np.array(depths, dtype=np.int64)

    @functools.cached_property
    def ends(self) -> IntArray:
        """One past the last token of all that is below each edge, its own included [E]."""
        ends = [len(self.tokens)] * len(self.edges)
        path: list[int] = []
        for edge, (start, _, parent) in enumerate(self.edges.tolist()):
            while path and path[-1] != parent:
                ends[path.pop()] = start
            if parent >= 0 and not path:
                raise ValueError(f"edge {edge} cannot go on from edge {parent}; expected depth-first order")
            path.append(edge)
        return np.array(ends, dtype=np.int64)

    @property
    def stretches(self) -> list[Stretch]:
        """The attention runs of the tree, in order; they cover its tokens."""
        found: list[Stretch] = []
        paths: list[Ranges] = []
        for edge, (start, stop, parent) in enumerate(self.edges.tolist()):
            before = paths[parent] if parent >= 0 else ()
            if found and parent >= 0 and parent == edge - 1:
                found[-1] = found[-1]._replace(stop=stop)
            else:
                found.append(Stretch(start, stop, before))
            paths.append(_extended(before, start, stop))
        return found

    @property
    def lengths(self) -> IntArray:
        """Tokens of each sequence [K]."""
        return cast("IntArray", self.depths[self.leaf] + self.edges[self.leaf, 1] - self.edges[self.leaf, 0])

    @property
    def shared(self) -> int:
        """Tokens that all sequences begin with."""
        return int(self.edges[0, 1]) if (self.edges[:, 2] < 0).sum() == 1 else 0

    @property
    def keys(self) -> int:
        """Keys of all attention runs: each run's own tokens and those before it on its path."""
        childless = np.ones(len(self.edges) + 1, dtype=bool)
        childless[self.edges[:, 2]] = False
        return int((self.depths + self.edges[:, 1] - self.edges[:, 0])[childless[:-1]].sum())

    @property
    def sequences(self) -> list[IdArray]:
        """The K sequences as separate id arrays, in order."""
        paths: list[Ranges] = []
        for start, stop, parent in self.edges.tolist():
            paths.append((*(paths[parent] if parent >= 0 else ()), (start, stop)))
        return [np.concatenate([self.tokens[a:b] for a, b in paths[edge]]) for edge in self.leaf.tolist()]

    def unshared(self) -> list[Tree]:
        """The same sequences as K trees of one."""
        return [alone(sequence) for sequence in self.sequences]


def _extended(path: Ranges, start: int, stop: int) -> Ranges:
    """A path and the tokens after it; ranges that touch become one."""
    if path and path[-1][1] == start:
        return (*path[:-1], (path[-1][0], stop))
    return (*path, (start, stop))


def alone(sequence: IdArray) -> Tree:
    """A tree of one sequence.

    Args:
        sequence: its token ids, int32, at least one.
    """
    return Tree(sequence, np.array([[0, len(sequence), -1]], dtype=np.int32), np.zeros(1, dtype=np.int32))


def grow(sequences: Sequence[Sequence[int] | IdArray]) -> Tree:
    """Make the tree of some sequences.

    The comparison is on the tokens of the finished sequences, so it needs no knowledge of where the prompt ends and
    cannot be broken by a tokenizer that merges across that border.

    >>> tree = grow([[1, 2, 5], [1, 2, 3, 4], [1, 2], [1, 2, 5]])
    >>> tree.tokens.tolist(), tree.edges.tolist(), tree.leaf.tolist()
    ([1, 2, 3, 4, 5], [[0, 2, -1], [2, 4, 0], [4, 5, 0]], [2, 1, 0, 2])

    Args:
        sequences: K lists of token ids, none empty and no id negative; equal ones end at the same edge.

    Returns:
        The tree, its `leaf` in the order of `sequences`; what is in it does not depend on that order otherwise.

    Raises:
        ValueError: there is no sequence, or one is empty.
    """
    arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
    if not arrays or not all(map(len, arrays)):
        raise ValueError("a tree needs at least one sequence, and every sequence at least one token")
    # Big-endian bytes compare as the numbers do, and a beginning comes before what goes on from it.
    order = sorted(range(len(arrays)), key=[array.astype(">u4").tobytes() for array in arrays].__getitem__)
    in_order = [arrays[number] for number in order]
    known = [0, *itertools.starmap(common, itertools.pairwise(in_order))]
    added = [array[count:] for array, count in zip(in_order, known, strict=True)]
    stops = np.cumsum([len(part) for part in added]).tolist()
    branches = _branches(known, [len(array) for array in in_order], stops)

    borders = np.unique([0, *stops, *(branch for branch in branches if branch >= 0)]).astype(np.int32)
    edges = np.empty((len(borders) - 1, 3), dtype=np.int32)
    edges[:, 0], edges[:, 1], edges[:, 2] = borders[:-1], borders[1:], np.arange(-1, len(borders) - 2)
    leaf = np.empty(len(arrays), dtype=np.int32)
    start, last = 0, -1
    for number, stop, branch in zip(order, stops, branches, strict=True):
        if stop > start:
            first = int(np.searchsorted(borders, start))
            edges[first, 2] = np.searchsorted(borders, branch) - 1 if branch >= 0 else -1
            last = int(np.searchsorted(borders, stop)) - 1
        leaf[number] = last
        start = stop
    return Tree(np.concatenate(added), edges, leaf)


def common(left: IdArray, right: IdArray) -> int:
    """Tokens that two sequences both begin with.

    Args:
        left: token ids.
        right: token ids.

    Returns:
        Their number, 0 to the length of the shorter.
    """
    length = min(len(left), len(right))
    differs = left[:length] != right[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _branches(known: Sequence[int], lengths: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Where, in the tree's tokens, each sequence leaves those before it: one past the last token in common; -1: none.

    Args:
        known: tokens that each sequence has in common with the one before.
        lengths: its tokens.
        stops: where the tokens that it adds end.
    """
    branches: list[int] = []
    path: list[tuple[int, int]] = []  # depth and offset at which each part of the present path begins
    for depth, length, stop in zip(known, lengths, stops, strict=True):
        while path and path[-1][0] >= depth:
            path.pop()
        branches.append(path[-1][1] + depth - path[-1][0] if path else -1)
        if length > depth:
            path.append((depth, stop - (length - depth)))
    return branches


def part(tree: Tree, sequences: Sequence[int] | IntArray) -> Tree:
    """Take some sequences of a tree, as the tree that `grow` would make of them.

    >>> tree = grow([[1, 2, 5], [1, 2, 3, 4], [1, 2]])
    >>> part(tree, [1, 2]).edges.tolist(), part(tree, [1]).edges.tolist()
    ([[0, 2, -1], [2, 4, 0]], [[0, 4, -1]])

    Args:
        tree: the tree.
        sequences: places among its sequences, in any order, at least one.

    Returns:
        The tree, its `leaf` in the order of `sequences`.
    """
    places = np.asarray(sequences, dtype=np.int64)
    start, stop, parent = (column.tolist() for column in tree.edges.T)
    leaf = tree.leaf[places]
    kept = np.zeros(len(start), dtype=bool)
    kept[leaf] = True
    children = [0] * len(start)
    for edge in range(len(start) - 1, -1, -1):  # children come after their parents
        if kept[edge] and parent[edge] >= 0:
            kept[parent[edge]] = True
            children[parent[edge]] += 1
    ending = set(leaf.tolist())
    tokens: list[IdArray] = []
    edges: list[list[int]] = []
    number, length = {-1: -1}, 0
    for edge in np.flatnonzero(kept).tolist():
        above = parent[edge]
        tokens.append(tree.tokens[start[edge] : stop[edge]])
        size = stop[edge] - start[edge]
        if above >= 0 and children[above] == 1 and above not in ending:  # nothing branches or ends there any more
            edges[-1][1] += size
        else:
            edges.append([length, length + size, number[above]])
        number[edge] = len(edges) - 1
        length += size
    return Tree(
        np.concatenate(tokens),
        np.array(edges, dtype=np.int32),
        np.array([number[edge] for edge in leaf.tolist()], dtype=np.int32),
    )
