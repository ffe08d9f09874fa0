"""How large parts of many trees are, and which pairs they hold: what planning needs to know, without any token.

All numbers are counted over the whole data set, and every function works on arrays, so that an epoch of hundreds of
thousands of pairs is planned in seconds.

Shape letters: G trees, E edges and S sequences of all trees, P pairs, U units, I items (parts of trees).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from btrm_core.packing.cuts import KEYS_PER_TOKEN, cut
from btrm_core.packing.trees import Tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

GATHERED_KEY = 0.01
"""What a gathered key costs, in tokens: a few rows copied in every layer, beside some hundreds of operations for each
number of a token. An estimate from memory bandwidth; it matters for many short answers to a long prompt only."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """What I parts of trees take.

    Attributes:
        tokens_I: tokens computed.
        keys_I: keys of all attention runs, those on the paths before them included.
        scores_I: attention scores.
        lines_I: distinct sequences.
        longest_I: tokens of the longest one.
    """

    tokens_I: IntArray
    keys_I: IntArray
    scores_I: FloatArray
    lines_I: IntArray
    longest_I: IntArray

    @property
    def room_I(self) -> IntArray:
        """What each takes of a row's budget, as `cuts.room` says."""
        return np.maximum(self.tokens_I, -(-self.keys_I // KEYS_PER_TOKEN))

    def cost_I(self, hidden_size: int) -> FloatArray:
        """What each costs in a packed row, in tokens, float64 [I].

        An attention score costs about 1 / (6 * width) of a token's matrix products, which matters for long sequences
        in small models only.

        Args:
            hidden_size: width of the model.
        """
        gathered = GATHERED_KEY * (self.keys_I - self.tokens_I)
        return cast("FloatArray", self.tokens_I + gathered + self.scores_I / (6.0 * hidden_size))


@dataclass(frozen=True, eq=False)
class Forest:
    """The edges of many trees.

    Attributes:
        size_E: tokens of each edge, int64; edges of a tree next to each other, in its order.
        parent_E: the edge that each goes on from, or -1, int64.
        leaf_S: the edge that each sequence ends at, int64.
        starts_G: the first sequence of each tree, and one more entry: S.
    """

    size_E: IntArray
    parent_E: IntArray
    leaf_S: IntArray
    starts_G: IntArray

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Forest:
        """The edges of some trees.

        Args:
            trees: at least one tree; they are numbered in this order, and so are their sequences.
        """
        edges = np.concatenate([tree.edges for tree in trees]).astype(np.int64)
        leaf = np.concatenate([tree.leaf for tree in trees]).astype(np.int64)
        return cls.of_columns(edges, leaf, [len(tree.edges) for tree in trees], [len(tree.leaf) for tree in trees])

    @classmethod
    def of_columns(
        cls,
        edges: NDArray[np.integer],
        leaf: NDArray[np.integer],
        edges_G: Sequence[int] | IntArray,
        sequences_G: Sequence[int] | IntArray,
    ) -> Forest:
        """The edges of trees as they are stored, each tree's own counted from 0.

        Args:
            edges: the trees' `edges` [E, 3] one after another.
            leaf: their `leaf` [S] likewise.
            edges_G: number of edges of each tree.
            sequences_G: number of sequences of each tree.
        """
        edges_G, sequences_G = np.asarray(edges_G, np.int64), np.asarray(sequences_G, np.int64)
        first_G = np.cumsum(edges_G) - edges_G
        parent = edges[:, 2].astype(np.int64)
        return cls(
            size_E=(edges[:, 1] - edges[:, 0]).astype(np.int64),
            parent_E=np.where(parent < 0, -1, parent + np.repeat(first_G, edges_G)),
            leaf_S=leaf.astype(np.int64) + np.repeat(first_G, sequences_G),
            starts_G=np.append(0, np.cumsum(sequences_G)),
        )

    def __len__(self) -> int:
        return len(self.starts_G) - 1

    @functools.cached_property
    def stop_E(self) -> IntArray:
        """Tokens of the path to each edge, its own included."""
        total, above = self.size_E.copy(), self.parent_E.copy()
        while (below := np.flatnonzero(above >= 0)).size:  # every round looks twice as far up
            up = above[below]
            total[below], above[below] = total[below] + total[up], above[up]
        return total

    @functools.cached_property
    def lengths_S(self) -> IntArray:
        """Tokens of every sequence."""
        return self.stop_E[self.leaf_S]

    def unshared(self) -> Forest:
        """The same sequences, none of which begins with another's tokens."""
        count = len(self.leaf_S)
        return Forest(self.lengths_S, np.full(count, -1), np.arange(count), self.starts_G)

    def paths(self, item_N: IntArray, sequence_N: IntArray) -> tuple[IntArray, IntArray]:
        """The edges that items need to hold sequences: item and edge, each combination once and in order.

        Args:
            item_N: number of an item.
            sequence_N: a sequence that it holds; an item has as many entries as sequences.

        Returns:
            Item and edge of each combination, int64 arrays of one length.
        """
        width = len(self.size_E)
        found = [np.unique(item_N * width + self.leaf_S[sequence_N])]
        while len(found[-1]):
            up = self.parent_E[found[-1] % width]
            inside = up >= 0
            found.append(np.unique(found[-1][inside] // width * width + up[inside]))
        codes = np.unique(np.concatenate(found))
        return codes // width, codes % width

    def sizes(self, item_N: IntArray, sequence_N: IntArray, count: int) -> Sizes:
        """What `count` items take that hold these sequences; the arguments are those of `paths`.

        Args:
            item_N: the item of each sequence, from 0 to `count` - 1.
            sequence_N: number of each sequence in the forest.
            count: how many items there are.
        """
        item, edge = self.paths(item_N, sequence_N)
        size, stop = self.size_E[edge], self.stop_E[edge]
        width, up = len(self.size_E), self.parent_E[edge]
        last = ~np.isin(item * width + edge, (item * width + up)[up >= 0])

        def summed(values: IntArray) -> IntArray:
            return np.bincount(item, values, count).astype(np.int64)

        distinct = np.unique(item_N * len(self.leaf_S) + sequence_N)
        longest = np.zeros(count, dtype=np.int64)
        np.maximum.at(longest, item, stop)
        return Sizes(
            tokens_I=summed(size),
            keys_I=summed(stop * last),
            scores_I=np.bincount(item, size * (stop - size / 2), count).astype(np.float64),
            lines_I=np.bincount(distinct // max(len(self.leaf_S), 1), minlength=count),
            longest_I=longest,
        )


@dataclass(frozen=True, eq=False)
class PairPlaces:
    """P pairs as places in a forest.

    Attributes:
        forest: the trees.
        tree_P: the tree of each pair, ascending.
        chosen_P: the chosen sequence, counted over all trees.
        rejected_P: the rejected one.
        unit_P: what the pair counts as in a step, ascending: itself, or the ranking that several pairs are made from.
    """

    forest: Forest
    tree_P: IntArray
    chosen_P: IntArray
    rejected_P: IntArray
    unit_P: IntArray

    def __len__(self) -> int:
        return len(self.tree_P)

    @functools.cached_property
    def starts_U(self) -> IntArray:
        """The first pair of each unit, and one more entry: P."""
        changes = np.flatnonzero(np.diff(self.unit_P)) + 1
        return np.concatenate([[0], changes, [len(self)]]) if len(self) else np.zeros(1, np.int64)

    @property
    def num_units(self) -> int:
        """Number of units."""
        return len(self.starts_U) - 1

    @functools.cached_property
    def tokens_P(self) -> IntArray:
        """Tokens of both sequences of each pair: what separate passes compute."""
        return cast("IntArray", self.forest.lengths_S[self.chosen_P] + self.forest.lengths_S[self.rejected_P])

    @property
    def tails_P2(self) -> IntArray:
        """Tokens of the chosen and of the rejected sequence of each pair after what both begin with."""
        lengths_P2 = np.stack([self.forest.lengths_S[self.chosen_P], self.forest.lengths_S[self.rejected_P]], axis=1)
        sequences = np.concatenate([self.chosen_P, self.rejected_P])
        together_P = self.forest.sizes(np.tile(np.arange(len(self)), 2), sequences, len(self)).tokens_I
        return cast("IntArray", lengths_P2 - (self.tokens_P - together_P)[:, None])

    @functools.cached_property
    def unshared(self) -> PairPlaces:
        """The same pairs of sequences that share nothing."""
        return dataclasses.replace(self, forest=self.forest.unshared())

    def unit_sizes(self, whole: bool) -> Sizes:
        """What each unit takes by itself, or each pair unless units must stay `whole`.

        Args:
            whole: True for the sizes of units, [num_units]; False for those of pairs, [len(self)].
        """
        unit_P = self.unit_P if whole else np.arange(len(self))
        sequences = np.concatenate([self.chosen_P, self.rejected_P])
        return self.forest.sizes(np.tile(unit_P, 2), sequences, self.num_units if whole else len(self))

    def of_units(self, units: IntArray) -> IntArray:
        """The pairs of some units, in their order.

        Args:
            units: numbers of units.

        Returns:
            Numbers of pairs, int64 [pairs of these units], unit after unit.
        """
        first, count = self.starts_U[units], np.diff(self.starts_U)[units]
        before = np.cumsum(count) - count
        return cast("IntArray", np.arange(count.sum()) + np.repeat(first - before, count))

    def items(self, ids: IntArray) -> list[IntArray]:
        """Pairs by their trees.

        Args:
            ids: numbers of pairs, in any order.

        Returns:
            An int64 array [pairs of the tree] for each tree, by tree number; pairs of a tree keep their order.
        """
        ordered = ids[np.argsort(self.tree_P[ids], kind="stable")]
        return np.split(ordered, np.flatnonzero(np.diff(self.tree_P[ordered])) + 1) if len(ids) else []

    def sizes(self, items: Sequence[IntArray]) -> Sizes:
        """What the trees of some pairs take; the pairs of an item are of one tree.

        Args:
            items: numbers of pairs, an array for each item.
        """
        ids = np.concatenate(items) if items else np.zeros(0, np.int64)
        item_N = np.repeat(np.arange(len(items)), [len(item) for item in items])
        sequence_N = np.concatenate([self.chosen_P[ids], self.rejected_P[ids]])
        return self.forest.sizes(np.tile(item_N, 2), sequence_N, len(items))

    def divided(self, item: IntArray, budget: int, whole: bool) -> list[IntArray]:
        """Cut the pairs of a tree into parts that have room in a row, as `cuts.split` does.

        Args:
            item: pairs of one tree.
            budget: room for a part.
            whole: whether the pairs of a unit must stay together.

        Returns:
            Numbers of pairs, an int64 array [pairs of the part] for each part; every pair of `item` is in one.
        """
        keys = self.unit_P[item] if whole else item
        _, unit = np.unique(keys, return_inverse=True)
        sequences = np.concatenate([self.chosen_P[item], self.rejected_P[item]])
        number, edge = self.forest.paths(np.tile(unit, 2), sequences)
        edges, local = np.unique(edge, return_inverse=True)
        on_UE = np.zeros((int(unit.max()) + 1, len(edges)), dtype=bool)
        on_UE[number, local] = True
        up = self.forest.parent_E[edges]
        parts = cut(on_UE, self.forest.size_E[edges], np.where(up < 0, -1, np.searchsorted(edges, up)), budget)
        return [item[np.isin(unit, members)] for members in parts]
