"""Lays trees of token sequences out as rows: nothing padded, every shared token once.

This module decides where each token of a row lies, which tokens it may look at, and where the
rewards are read. It does not decide which trees share a row (`steps`) or how attention is
computed (`kernels`, `attention`); it needs torch only to turn finished rows into tensors.

A row is trees one after another, the tokens of each in depth-first order (`trees`). A token's position
is its depth, and every token carries `end`, one past the last row offset that may look at it: where
all that goes on from it ends. One rule is then the whole mask, `window` being the layer's sliding
window or infinity:

    visible(q, kv) = kv <= q and q < end[kv] and position[q] - position[kv] < window

Where a reward is read follows from lengths alone; no token id is ever compared with the pad id.

Shape letters, here and in the modules to the right of this one: P pairs, S sequences (rewards),
T tokens of a row, R attention runs, M ranges of tokens before runs, K key rows of all runs, H hidden,
B lines of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.packing.batch import Batch
from btrm_core.packing.trees import Tree

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Row:
    """One packed row of T tokens, as NumPy arrays, ready for a loader worker to hand over.

    Attributes:
        input_ids_T: token ids, int64.
        position_ids_T: each token's position in its own sequence, int64.
        end_T: one past the last row offset that may look at the token, int64.
        reward_index_S: offset of every sequence's last token, trees in order, K each, int64.
        group_sizes: K of every tree.
        runs_R2: attention runs, int64 columns query start and end; they cover the row in order. The queries
            of a run look at the tokens before it on its path and, causally, at themselves.
        prefix_starts_R: int64 [R + 1]: where the ranges of each run begin in `prefixes_M2`.
        prefixes_M2: the tokens before runs on their paths, int64 columns start and end, run after run.
        useful: tokens of all sequences, each counted by itself: what a separate pass for every
            sequence would compute, and so the same for any arrangement.
        shared: tokens of `useful` that the row does not compute again.
    """

    input_ids_T: IntArray
    position_ids_T: IntArray
    end_T: IntArray
    reward_index_S: IntArray
    group_sizes: tuple[int, ...]
    runs_R2: IntArray
    prefix_starts_R: IntArray
    prefixes_M2: IntArray
    useful: int
    shared: int

    @property
    def computed(self) -> int:
        """Tokens that the model computes: T, with the padding at the end."""
        return len(self.input_ids_T)

    @property
    def padding(self) -> int:
        """Tokens that belong to no sequence."""
        return self.computed + self.shared - self.useful

    def batch(self) -> Batch:
        """The row as tensors on the host, with who sees whom in it: input ids and positions are [1, T]."""
        import torch

        from btrm_core.packing.visibility import Visibility

        return Batch(
            input_ids=torch.from_numpy(self.input_ids_T)[None],
            position_ids=torch.from_numpy(self.position_ids_T)[None],
            attention_mask=None,
            visibility=Visibility.from_runs(
                self.runs_R2, self.prefix_starts_R, self.prefixes_M2, self.end_T, self.position_ids_T
            ),
            reward_index=torch.from_numpy(self.reward_index_S),
            group_sizes=self.group_sizes,
            computed=self.computed,
            useful=self.useful,
            shared=self.shared,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The row as tensors on a device.

        Args:
            device: where the tensors shall lie.
        """
        return self.batch().to(device)


@dataclass
class _RowParts:
    """What `pack_row` collects, in row order."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    positions: list[IntArray] = field(default_factory=list)
    ends: list[IntArray] = field(default_factory=list)
    rewards: list[NDArray[np.integer[Any]]] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    prefix_starts: list[int] = field(default_factory=lambda: [0])
    prefixes: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    def add(self, tree: Tree) -> None:
        """Append a tree with its positions, ends, rewards and runs."""
        first = self.length
        start_E, stop_E = tree.edges[:, 0], tree.edges[:, 1]
        size_E = stop_E - start_E
        self.ids.append(tree.tokens)
        self.positions.append(np.arange(len(tree.tokens)) + np.repeat(tree.depths - start_E, size_E))
        self.ends.append(np.repeat(tree.ends + first, size_E))
        self.rewards.append(stop_E[tree.leaf] + (first - 1))
        for start, stop, prefix in tree.stretches:
            self.runs.append((first + start, first + stop))
            self.prefixes += [(first + a, first + b) for a, b in prefix]
            self.prefix_starts.append(len(self.prefixes))
        self.length += len(tree.tokens)

    def pad(self, count: int, pad_id: int) -> None:
        """Append `count` pad tokens as one sequence of their own, which nothing else looks at."""
        self.ids.append(np.full(count, pad_id, dtype=np.int32))
        self.positions.append(np.arange(count))
        self.ends.append(np.full(count, self.length + count))
        self.runs.append((self.length, self.length + count))
        self.prefix_starts.append(len(self.prefixes))
        self.length += count


def pack_row(trees: Sequence[Tree], *, share_prefix: bool = True, multiple_of: int = 1, pad_id: int = 0) -> Row:
    """Lay trees one after another in one row.

    >>> from btrm_core.packing import grow
    >>> row = pack_row([grow([[1, 2, 3, 4], [1, 2, 5]])])
    >>> row.position_ids_T.tolist(), row.end_T.tolist(), row.reward_index_S.tolist()
    ([0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [3, 4])

    Args:
        trees: the trees, in order. None gives a row of padding without rewards, which lets a
            rank without pairs take part in a step.
        share_prefix: False computes every sequence whole, through the same code.
        multiple_of: round T up to this with pad tokens.
        pad_id: id of the tokens that fill the row up; any id of the vocabulary will do.

    Returns:
        The row, with the rewards of the first tree's sequences first.
    """
    parts = _RowParts()
    for tree in trees:
        for one in [tree] if share_prefix else tree.unshared():
            parts.add(one)
    missing = -parts.length % multiple_of or (0 if trees else multiple_of)
    useful = sum(int(tree.lengths.sum()) for tree in trees)
    saved = useful - parts.length
    if missing:
        parts.pad(missing, pad_id)
    return Row(
        input_ids_T=np.concatenate(parts.ids).astype(np.int64),
        position_ids_T=np.concatenate(parts.positions).astype(np.int64, copy=False),
        end_T=np.concatenate(parts.ends).astype(np.int64, copy=False),
        reward_index_S=np.concatenate([np.zeros(0, np.int64), *parts.rewards]).astype(np.int64, copy=False),
        group_sizes=tuple(len(tree.leaf) for tree in trees),
        runs_R2=np.array(parts.runs, dtype=np.int64).reshape(-1, 2),
        prefix_starts_R=np.array(parts.prefix_starts, dtype=np.int64),
        prefixes_M2=np.array(parts.prefixes, dtype=np.int64).reshape(-1, 2),
        useful=useful,
        shared=saved,
    )


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Sequences one per line, padded on the right: the reference, and the fallback.

    Attributes:
        input_ids_BT: token ids, int64; a batch without trees is one line of padding.
        position_ids_BT: 0, 1, 2, ... on every line, int64.
        attention_mask_BT: 1 for tokens of a sequence, 0 for padding, int64.
        reward_index_S: offset of every sequence's last token in the flattened lines, int64.
        group_sizes: K of every tree.
        useful: tokens of all sequences.
        shared: always 0: padded lines share nothing.
    """

    input_ids_BT: IntArray
    position_ids_BT: IntArray
    attention_mask_BT: IntArray
    reward_index_S: IntArray
    group_sizes: tuple[int, ...]
    useful: int
    shared: int = 0

    @property
    def computed(self) -> int:
        """Tokens that the model computes, padding included."""
        return int(self.input_ids_BT.size)

    @property
    def padding(self) -> int:
        """Tokens that belong to no sequence."""
        return self.computed - self.useful

    def batch(self) -> Batch:
        """The lines as tensors on the host: input ids, positions and mask are [B, T]."""
        import torch

        return Batch(
            input_ids=torch.from_numpy(self.input_ids_BT),
            position_ids=torch.from_numpy(self.position_ids_BT),
            attention_mask=torch.from_numpy(self.attention_mask_BT),
            visibility=None,
            reward_index=torch.from_numpy(self.reward_index_S),
            group_sizes=self.group_sizes,
            computed=self.computed,
            useful=self.useful,
            shared=self.shared,
            lengths=tuple(self.attention_mask_BT.sum(1).tolist()),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The lines as tensors on a device.

        Args:
            device: where the tensors shall lie.
        """
        return self.batch().to(device)


def pad_rows(trees: Sequence[Tree], *, pad_id: int = 0, multiple_of: int = 1) -> PaddedRows:
    """Lay every sequence on a line of its own, padded on the right to the longest.

    >>> from btrm_core.packing import grow
    >>> rows = pad_rows([grow([[1, 2, 3, 4], [1, 2, 5]])], pad_id=9)
    >>> rows.input_ids_BT.tolist(), rows.reward_index_S.tolist()
    ([[1, 2, 3, 4], [1, 2, 5, 9]], [3, 6])

    Args:
        trees: the trees, in order; sequences keep the order of `pack_row`.
        pad_id: id of the tokens that fill lines up; masked out, so any id of the vocabulary will do.
        multiple_of: round the length of the lines up to this.

    Returns:
        B lines: one a sequence, or one of padding alone if there is no tree.
    """
    sequences = [sequence for tree in trees for sequence in tree.sequences]
    lengths_S = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    lines, longest = max(len(sequences), 1), max(int(lengths_S.max(initial=1)), 1)
    longest += -longest % multiple_of
    ids_BT = np.full((lines, longest), pad_id, dtype=np.int64)
    for line, sequence in enumerate(sequences):
        ids_BT[line, : len(sequence)] = sequence
    position_T = np.arange(longest)
    # A line without a token of its own would leave the softmax nothing to sum over.
    seen_B = lengths_S if sequences else np.ones(1, dtype=np.int64)
    return PaddedRows(
        input_ids_BT=ids_BT,
        position_ids_BT=np.tile(position_T, (lines, 1)),
        attention_mask_BT=(position_T[None, :] < seen_B[:, None]).astype(np.int64),
        reward_index_S=np.arange(len(sequences)) * longest + lengths_S - 1,
        group_sizes=tuple(len(tree.leaf) for tree in trees),
        useful=int(lengths_S.sum()),
    )
