from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from btrm_core.data.pairs import pairs_from_rows
from btrm_core.data.quality import contradictory_pairs, duplicate_pairs, duplicate_prompts, longer_wins_characters


def data(*rows):
    return pairs_from_rows([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])


MIXED = (("p", "a", "b"), ("p", "a", "c"), ("p", "b", "a"), ("q", "a", "b"), ("p", "a", "b"), ("q", "c", "d"))


def test_findings_name_the_pairs():
    found = duplicate_prompts(data(*MIXED))
    assert (found.count, found.pairs, found.share) == (4, 6, 4 / 6)
    assert found.examples == ("rows:2", "rows:3", "rows:5", "rows:6")
    assert duplicate_pairs(data(*MIXED)).examples == ("rows:5",)
    assert contradictory_pairs(data(*MIXED)).examples == ("rows:1", "rows:3", "rows:5")


def test_sound_data_has_no_findings():
    sound = data(("p", "a", "b"), ("q", "b", "a"))
    assert [check(sound).count for check in (duplicate_prompts, duplicate_pairs, contradictory_pairs)] == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.sampled_from("ab")], *[st.sampled_from("xyz")] * 2).filter(lambda t: t[1] != t[2]), min_size=1
    )
)
def test_findings_match_counting_by_hand(rows):
    made = data(*rows)
    seen = [(p, c, r) for p, c, r in rows]
    assert duplicate_prompts(made).count == len(rows) - len({p for p, _, _ in rows})
    assert duplicate_pairs(made).count == len(rows) - len(set(seen))
    assert contradictory_pairs(made).count == sum((p, r, c) in seen for p, c, r in seen)


def test_longer_wins_counts_characters_and_ties_half():
    assert (
        longer_wins_characters(data(("p", "long", "xx"), ("q", "x", "long"), ("r", "ab", "cd"), ("s", "éé", "e")))
        == 2.5 / 4
    )
    assert math.isnan(longer_wins_characters(data(("p", "a", "b")).select(np.array([], dtype=np.int64), "none", None)))
