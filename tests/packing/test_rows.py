from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from btrm_core.packing.batch import Batch
from btrm_core.packing.rows import pack_row, pad_rows
from btrm_core.packing.trees import Tree, grow


@st.composite
def groups(draw: st.DrawFn) -> Tree:
    prefix = draw(st.lists(st.integers(0, 50), max_size=12))
    tails = draw(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=4))
    return grow([[*prefix, *tail] or [7] for tail in tails])


def visible_tokens(row, query: int) -> list[int]:
    """Row offsets that a query sees by the rule of the module's docstring, written out."""
    return [kv for kv in range(query + 1) if query < row.end_T[kv]]


@given(st.lists(groups(), max_size=4), st.booleans(), st.sampled_from([1, 8, 128]))
def test_every_reward_sees_exactly_its_own_sequence(given_groups, sharing, multiple) -> None:
    row = pack_row(given_groups, share_prefix=sharing, multiple_of=multiple, pad_id=49)
    sequences = [sequence for group in given_groups for sequence in group.sequences]
    assert len(row.reward_index_S) == len(sequences)
    for index, sequence in zip(row.reward_index_S, sequences, strict=True):
        seen = visible_tokens(row, index)
        assert row.input_ids_T[seen].tolist() == sequence.tolist()
        assert row.position_ids_T[seen].tolist() == list(range(len(sequence)))


@given(st.lists(groups(), max_size=4), st.booleans(), st.sampled_from([1, 8, 128]))
def test_runs_cover_the_row_and_agree_with_the_rule(given_groups, sharing, multiple) -> None:
    row = pack_row(given_groups, share_prefix=sharing, multiple_of=multiple)
    offset = 0
    for number, (start, stop) in enumerate(row.runs_R2.tolist()):
        assert start == offset
        assert stop > start
        offset = stop
        ranges = row.prefixes_M2[row.prefix_starts_R[number] : row.prefix_starts_R[number + 1]].tolist()
        for query in range(start, stop):
            keys = [*(key for a, b in ranges for key in range(a, b)), *range(start, query + 1)]
            assert keys == visible_tokens(row, query)
    assert offset == row.computed


@given(st.lists(groups(), max_size=4), st.booleans(), st.sampled_from([1, 8, 128]))
def test_counts(given_groups, sharing, multiple) -> None:
    row = pack_row(given_groups, share_prefix=sharing, multiple_of=multiple)
    lengths = [len(sequence) for group in given_groups for sequence in group.sequences]
    distinct = sum(len(group.tokens) for group in given_groups)
    assert row.useful == sum(lengths)
    assert row.computed % multiple == 0
    assert row.shared == (sum(lengths) - distinct if sharing else 0)
    assert row.padding == row.computed - (distinct if sharing else sum(lengths))
    assert 0 <= row.padding <= max(multiple - 1, 0 if given_groups else multiple)
    assert row.group_sizes == tuple(len(group.leaf) for group in given_groups)


@given(st.lists(groups(), max_size=4), st.sampled_from([1, 8]))
def test_padded_lines_hold_the_same_sequences(given_groups, multiple) -> None:
    rows = pad_rows(given_groups, pad_id=49, multiple_of=multiple)
    sequences = [sequence for group in given_groups for sequence in group.sequences]
    longest = rows.input_ids_BT.shape[1]
    for line, sequence in enumerate(sequences):
        kept = rows.attention_mask_BT[line].astype(bool)
        assert rows.input_ids_BT[line][kept].tolist() == sequence.tolist()
        assert rows.input_ids_BT[line][~kept].tolist() == [49] * (longest - len(sequence))
        assert rows.reward_index_S[line] == line * longest + len(sequence) - 1
    assert rows.useful == sum(map(len, sequences))
    assert rows.padding == rows.input_ids_BT.size - rows.useful
    assert rows.attention_mask_BT.any(axis=1).all()


def test_equal_sequences_are_read_at_one_place() -> None:
    row = pack_row([grow([[5, 6, 7], [5, 6, 7], [5, 6]])])
    assert row.reward_index_S.tolist() == [2, 2, 1]
    assert (row.useful, row.computed, row.shared) == (8, 3, 5)


def test_the_reward_position_ignores_token_ids() -> None:
    pad_like = grow([[0, 0, 0, 7, 0], [0, 0, 0, 0]])
    row = pack_row([pad_like], pad_id=0, multiple_of=8)
    assert row.input_ids_T.tolist() == [0, 0, 0, 0, 7, 0, 0, 0]
    assert row.reward_index_S.tolist() == [5, 3]
    assert pad_rows([pad_like], pad_id=0).reward_index_S.tolist() == [4, 8]


def test_no_groups_make_a_row_of_padding_without_rewards() -> None:
    row = pack_row([], multiple_of=128, pad_id=3)
    assert row.input_ids_T.tolist() == [3] * 128
    assert row.reward_index_S.tolist() == []
    assert pack_row([]).computed == 1
    assert pad_rows([], pad_id=3).input_ids_BT.tolist() == [[3]]


def test_batches_are_tensors_that_survive_a_loader_worker() -> None:
    batch = pack_row([grow([[1, 2, 3, 4], [1, 2, 5]])], multiple_of=8).batch()
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.reward_index.dtype == torch.int64
    again: Batch = pickle.loads(pickle.dumps(batch)).to("cpu")
    assert again.visibility is not None
    assert again.visibility.runs == batch.visibility.runs
    assert torch.equal(again.visibility.visible(None), batch.visibility.visible(None))
    assert (again.computed, again.useful, again.shared, again.group_sizes) == (8, 7, 2, (2,))


def test_padded_batches_have_a_mask_and_no_layout() -> None:
    batch = pad_rows([grow([[1, 2, 3, 4], [1, 2, 5]])], pad_id=9).to("cpu")
    assert batch.visibility is None
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_packing_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, btrm_core.packing, btrm_core.data, btrm_core.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
