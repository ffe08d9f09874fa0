"""Trees of sequences: what they hold, how they are taken apart, and what is refused."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tries import beginnings, nodes, sequences_of

from btrm_core.packing.trees import Tree, alone, grow, part


def equal(left: Tree, right: Tree) -> bool:
    return all(getattr(left, name).tolist() == getattr(right, name).tolist() for name in ("tokens", "edges", "leaf"))


@given(sequences_of)
def test_a_tree_holds_every_distinct_beginning_once(sequences: list[list[int]]) -> None:
    tree = grow(sequences)
    assert [sequence.tolist() for sequence in tree.sequences] == sequences
    assert tree.lengths.tolist() == [len(sequence) for sequence in sequences]
    found = nodes(tree)
    assert len(found) == len(set(found))
    assert set(found) == beginnings(sequences)
    assert found == sorted(found), "depth-first, the smaller token first"


@given(sequences_of)
def test_edges_are_cut_where_something_branches_or_ends_and_nowhere_else(sequences: list[list[int]]) -> None:
    tree = grow(sequences)
    trie, ends = beginnings(sequences), {tuple(sequence) for sequence in sequences}
    found = nodes(tree)
    followers = {node: sum(other[:-1] == node for other in trie) for node in trie}
    for start, stop, _ in tree.edges.tolist():
        for offset in range(start, stop - 1):
            assert followers[found[offset]] == 1
            assert found[offset] not in ends
        assert found[stop - 1] in ends or followers[found[stop - 1]] > 1
    assert tree.depths.tolist() == [len(found[start]) - 1 for start in tree.edges[:, 0].tolist()]
    for edge, end in enumerate(tree.ends.tolist()):
        below = found[tree.edges[edge, 1] - 1]
        inside = [offset for offset, node in enumerate(found) if node[: len(below)] == below]
        assert end == max(inside) + 1
    assert tree.shared == len(sequences[0]) or len({tuple(sequence[: tree.shared + 1]) for sequence in sequences}) > 1


@given(sequences_of, st.randoms())
def test_the_order_of_the_sequences_is_that_of_their_leaves_alone(sequences: list[list[int]], random) -> None:
    order = list(range(len(sequences)))
    random.shuffle(order)
    tree, other = grow(sequences), grow([sequences[i] for i in order])
    assert tree.tokens.tolist() == other.tokens.tolist()
    assert tree.edges.tolist() == other.edges.tolist()
    assert tree.leaf[order].tolist() == other.leaf.tolist()


@given(sequences_of)
def test_stretches_cover_the_tree_with_one_run_per_leaf(sequences: list[list[int]]) -> None:
    tree = grow(sequences)
    found, offset, keys = nodes(tree), 0, 0
    for start, stop, prefix in tree.stretches:
        assert start == offset < stop
        path = [found[i][-1] for a, b in prefix for i in range(a, b)]
        assert [*path, *tree.tokens[start:stop].tolist()] == list(found[stop - 1])
        assert all(left[1] < right[0] for left, right in itertools.pairwise(prefix)), "neighbours are joined"
        offset, keys = stop, keys + len(path) + stop - start
    assert offset == len(tree.tokens)
    childless = set(range(len(tree.edges))) - set(tree.edges[:, 2].tolist())
    assert len(tree.stretches) == len(childless)
    assert keys == tree.keys


@given(sequences_of, st.data())
def test_a_part_is_the_tree_of_its_sequences(sequences: list[list[int]], data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8))
    assert equal(part(grow(sequences), places), grow([sequences[place] for place in places]))


def test_one_sequence_is_a_tree_of_one_edge() -> None:
    assert equal(grow([[5, 6, 7]]), alone(np.array([5, 6, 7], dtype=np.int32)))
    assert [equal(tree, grow([[5, 6]])) for tree in grow([[5, 6], [5, 6]]).unshared()] == [True, True]


@pytest.mark.parametrize(
    ("tokens", "edges", "leaf", "message"),
    [
        (4, [[0, 2, -1], [3, 4, 0]], [1], "edges [[0, 2, -1], [3, 4, 0]] do not cover 4 tokens one after another"),
        (4, [[0, 2, -1], [2, 3, 0]], [1], "edges [[0, 2, -1], [2, 3, 0]] do not cover 4 tokens one after another"),
        (2, [[0, 2, -1], [2, 2, 0]], [1], "edges [[0, 2, -1], [2, 2, 0]] do not cover 2 tokens one after another"),
        (2, [[0, 2, -1]], [], "a tree needs at least one sequence of at least one token"),
        (2, [[0, 2, -1]], [1], "sequences end at edges [1]; expected edges 0 to 0"),
        (3, [[0, 1, -1], [1, 2, 0], [2, 3, 0]], [1], "edge 2 leads to no sequence"),
        (
            4,
            [[0, 1, -1], [1, 2, 0], [2, 3, -1], [3, 4, 0]],
            [1, 2, 3],
            "edge 3 cannot go on from edge 0; expected depth-first order",
        ),
    ],
)
def test_impossible_trees_are_refused(tokens, edges, leaf, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Tree(np.zeros(tokens, np.int32), np.array(edges, np.int32).reshape(-1, 3), np.array(leaf, np.int32))


def test_growing_nothing_is_refused() -> None:
    for sequences in ([], [[1, 2], []]):
        with pytest.raises(
            ValueError, match="a tree needs at least one sequence, and every sequence at least one token"
        ):
            grow(sequences)


def test_trees_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, btrm_core.packing.trees; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
