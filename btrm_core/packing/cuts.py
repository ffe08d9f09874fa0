"""How a tree that is too large for a row is cut into parts, and what a tree takes of a row.

Decides which sequences stay together. It knows no rows and no models, and needs no torch.

Shape letters: E edges of a tree, U units that must not be parted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from btrm_core.packing.trees import Tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IdArray = NDArray[np.int32]
    IntArray = NDArray[np.int64]

KEYS_PER_TOKEN = 16
"""Keys of a row per token of its budget. Attention gathers the keys of a shared beginning for every run below it, so
without a limit hundreds of short responses to a long prompt would need little compute and much memory."""


def room(tokens: int, keys: int) -> int:
    """What a tree takes of a row's budget, in tokens: its tokens, or its keys where these are many.

    Args:
        tokens: tokens of the tree.
        keys: keys of all its attention runs; see `Tree.keys`.
    """
    return max(tokens, -(-keys // KEYS_PER_TOKEN))


def split(tree: Tree, budget: int, together: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """Cut what is too large for a row into parts that repeat little of each other.

    A part begins with the first sequence left, in depth-first order, and takes the one of which it has the largest
    share already, as long as that fits. One that is too large by itself is a part of its own.

    >>> from btrm_core.packing import grow
    >>> tree = grow([[1, 2, 3, n] for n in range(4)] + [[5]])
    >>> split(tree, 6), split(tree, 5, together=[[0, 3], [1, 2], [3, 4]])
    ([[0, 1, 2], [3, 4]], [[0], [1], [2]])

    Args:
        tree: the tree.
        budget: room for a part, in tokens; see `room`.
        together: sequences that must not be parted, as lists of places; None: each by itself.

    Returns:
        Numbers of entries of `together`, or places of sequences: each in one part.
    """
    if together is None:
        together = [[place] for place in range(len(tree.leaf))]
    paths_EE = np.eye(len(tree.edges), dtype=bool)
    for edge, parent in enumerate(tree.edges[:, 2].tolist()):
        if parent >= 0:
            paths_EE[edge] |= paths_EE[parent]
    on_UE = np.stack([paths_EE[tree.leaf[list(places)]].any(0) for places in together])
    return cut(on_UE, tree.edges[:, 1] - tree.edges[:, 0], tree.edges[:, 2], budget)


def cut(
    on_UE: NDArray[np.bool_], size_E: IntArray | IdArray, parent_E: IntArray | IdArray, budget: int
) -> list[list[int]]:
    """Cut units of a tree into parts, as `split` says.

    Args:
        on_UE: which edges each unit needs, bool [U, E].
        size_E: tokens of each edge.
        parent_E: the edge that each goes on from, or -1.
        budget: room for a part, in tokens.

    Returns:
        The units of each part, as numbers from 0; each in one part.
    """
    size_E, parent_E = size_E.astype(np.int64), parent_E.astype(np.int64)
    length_E = size_E.copy()
    for edge, parent in enumerate(parent_E.tolist()):
        length_E[edge] += length_E[parent] if parent >= 0 else 0

    def fits(have_E: NDArray[np.bool_]) -> bool:
        last_E = have_E.copy()
        last_E[parent_E[have_E & (parent_E >= 0)]] = False
        return room(int(size_E[have_E].sum()), int(length_E[last_E].sum())) <= budget

    left = np.array(sorted(range(len(on_UE)), key=lambda unit: np.flatnonzero(on_UE[unit]).tolist()))
    whole_U = on_UE @ size_E
    parts: list[list[int]] = []
    while len(left):
        have_E, members, left = on_UE[left[0]].copy(), [int(left[0])], left[1:]
        while len(left):
            new_U = on_UE[left] @ np.where(have_E, 0.0, size_E) / whole_U[left]
            best = int(new_U.argmin())
            taken = new_U == 0 if new_U[best] == 0 else np.arange(len(left)) == best
            if new_U[best] > 0 and not fits(have_E | on_UE[left[best]]):
                break
            have_E |= on_UE[left[best]]
            members += left[taken].tolist()
            left = left[~taken]
        parts.append(members)
    return parts
