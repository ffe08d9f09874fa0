from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from btrm_core.packing.bundles import bundles, packed_rows, padded_rows
from btrm_core.packing.cuts import room

ids = st.lists(st.integers(0, 2), min_size=1, max_size=12)
labelled = st.lists(st.tuples(ids, st.integers(0, 3)), max_size=30)


@settings(deadline=None)
@given(labelled, st.integers(1, 40))
def test_every_sequence_is_in_one_row_under_the_budget(items: list[tuple[list[int], int]], budget: int) -> None:
    sequences, labels = [item[0] for item in items], [item[1] for item in items]
    found = bundles(sequences, labels, budget)
    for bundle in found:
        assert len({labels[member] for member in bundle.members}) == 1
        assert [s.tolist() for s in bundle.tree.sequences] == [sequences[member] for member in bundle.members]
    rows = packed_rows(found, budget)
    assert sorted(m for row in rows for bundle in row for m in bundle.members) == list(range(len(items)))
    for row in rows:
        assert row
        distinct = {tuple(ids.tolist()) for bundle in row for ids in bundle.tree.sequences}
        single = len(row) == 1 and max(map(len, distinct)) == row[0].tokens
        assert single or sum(room(bundle.tokens, bundle.tree.keys) for bundle in row) <= budget
    if rows:
        longest = [max(bundle.tokens for bundle in row) for row in rows]
        assert longest[0] == max(longest)

    lines = padded_rows(found, budget)
    assert sorted(m for row in lines for bundle in row for m in bundle.members) == list(range(len(items)))
    for row in lines:
        assert len(row) == 1 or len(row) * max(bundle.tokens for bundle in row) <= budget
        for bundle in row:
            assert bundle.tree.sequences[0].tolist() == sequences[bundle.members[0]]


def test_many_short_responses_to_a_long_prompt_are_split_for_their_keys() -> None:
    prompt = list(range(100))
    found = bundles([[*prompt, 200 + n] for n in range(100)], [0] * 100, budget=300)
    assert all(bundle.tokens <= 300 for bundle in found)
    assert [len(bundle.members) for bundle in found] == [47, 47, 6]  # 47 * 101 keys <= 16 * 300


def test_a_row_is_filled_by_the_first_bundle_that_fits() -> None:
    found = bundles([[1] * 6, [2] * 5, [3] * 4, [4] * 3], [0, 1, 2, 3], budget=10)
    assert [[bundle.members[0] for bundle in row] for row in packed_rows(found, 10)] == [[0, 2], [1, 3]]
