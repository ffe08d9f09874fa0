"""Trees that are too large for a row: what is cut, what stays together, and what a tree takes of a row."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.tries import beginnings, nodes, sequences_of

from btrm_core.packing.cuts import KEYS_PER_TOKEN, room, split
from btrm_core.packing.trees import Tree, grow, part


@settings(deadline=None)
@given(sequences_of, st.integers(1, 30), st.data())
def test_a_split_parts_nothing_that_belongs_together(
    sequences: list[list[int]], budget: int, data: st.DataObject
) -> None:
    tree, place = grow(sequences), st.integers(0, len(sequences) - 1)
    together = data.draw(st.none() | st.lists(st.lists(place, min_size=1, max_size=3), min_size=1, max_size=8))
    units = [[i] for i in range(len(sequences))] if together is None else together
    parts = split(tree, budget, together)
    assert sorted(unit for members in parts for unit in members) == list(range(len(units)))
    computed = 0
    for members in parts:
        piece = part(tree, [i for unit in members for i in units[unit]])
        computed += len(piece.tokens)
        same = all(beginnings([sequences[i] for i in units[unit]]) <= set(nodes(piece)) for unit in members)
        assert same
        alike = len({frozenset(beginnings([sequences[i] for i in units[unit]])) for unit in members}) == 1
        assert alike or room(len(piece.tokens), piece.keys) <= budget or _inside_the_first(tree, units, members)
    assert computed <= sum(len(part(tree, unit).tokens) for unit in units)
    needed = part(tree, [i for unit in units for i in unit])
    if room(len(needed.tokens), needed.keys) <= budget:
        assert len(parts) == 1


def _inside_the_first(tree: Tree, units: list[list[int]], members: list[int]) -> bool:
    """Whether a part is one unit that is too large, with what costs nothing beside it."""
    sequences = [sequence.tolist() for sequence in tree.sequences]
    sets = [beginnings([sequences[i] for i in units[unit]]) for unit in members]
    return any(all(other <= largest for other in sets) for largest in sets)


def test_a_split_keeps_branches_together() -> None:
    root, branches = [0] * 10, [[1] * 40, [2] * 40]
    sequences = [[*root, *branches[n % 2], 3 + n, 3 + n] for n in range(12)]
    assert split(grow(sequences), 70) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    parts = split(grow(sequences), 110, pairs)
    repeated = sum(len(part(grow(sequences), [i for unit in members for i in pairs[unit]]).tokens) for members in parts)
    assert repeated <= 3 * 110, "all pairs of twelve answers, of which a row has room for all but two"


def test_many_short_sequences_are_split_for_their_keys() -> None:
    sequences = [[*range(100), 200 + n] for n in range(100)]
    tree = grow(sequences)
    assert len(tree.tokens) == 200
    assert tree.keys == 100 * 101 > KEYS_PER_TOKEN * 300
    assert [len(members) for members in split(tree, 300)] == [47, 47, 6]  # 47 * 101 keys <= 16 * 300
