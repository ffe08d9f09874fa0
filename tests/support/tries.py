"""What a tree of sequences holds, written out beginning by beginning, and small sequences that share many."""

from __future__ import annotations

from hypothesis import strategies as st

from btrm_core.packing.trees import Tree

ids = st.lists(st.integers(0, 2), min_size=1, max_size=8)
sequences_of = st.lists(ids, min_size=1, max_size=8)


def beginnings(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    """The nodes of the trie, written out."""
    return {tuple(sequence[:count]) for sequence in sequences for count in range(1, len(sequence) + 1)}


def nodes(tree: Tree) -> list[tuple[int, ...]]:
    """The node of the trie that each token of a tree is."""
    paths: list[tuple[int, ...]] = []
    found = []
    for start, stop, parent in tree.edges.tolist():
        path = paths[parent] if parent >= 0 else ()
        for token in tree.tokens[start:stop].tolist():
            path = (*path, token)
            found.append(path)
        paths.append(path)
    return found
