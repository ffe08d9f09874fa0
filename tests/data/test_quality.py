from __future__ import annotations

import math
from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from btrm_core.data.pairs import pairs_from_rows
from btrm_core.data.quality import (
    Sharing,
    contradictory_pairs,
    duplicate_pairs,
    duplicate_prompts,
    format_inspection,
    inspect_pairs,
    longer_wins_characters,
    sharing,
)


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


def test_what_the_pairs_of_a_prompt_share():
    made = data(("a prompt", "yes", "no"), ("another", "yes", "no, never"), ("a prompt", "perhaps", "no"))
    once = len("a prompt" + "yes" + "no" + "perhaps" + "another" + "yes" + "no, never")
    separate = (
        4 * len("a prompt") + len("yes" + "no" + "perhaps" + "no") + 2 * len("another") + len("yes" + "no, never")
    )
    keys = 3 * len("a prompt") + len("yes" + "no" + "perhaps") + 2 * len("another") + len("yes" + "no, never")
    assert sharing(made) == Sharing(3, 2, 5, separate, once, keys)
    found = inspect_pairs(made)
    assert found["sharing"]["saved"] == 1 - once / separate
    line = f"sharing          {1 - once / separate:.1%} of the characters are shared by the two sides of a pair"
    assert line in format_inspection(found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["p", "long prompt", "ü"]), *[st.sampled_from(["a", "bb", "ccc"])] * 2).filter(
            lambda t: t[1] != t[2]
        ),
        min_size=1,
    )
)
def test_sharing_matches_counting_by_hand(rows):
    found = sharing(data(*rows))
    prompts = {prompt for prompt, _, _ in rows}
    conversations = set(chain.from_iterable(((p, c), (p, r)) for p, c, r in rows))
    assert (found.pairs, found.prompts, found.conversations) == (len(rows), len(prompts), len(conversations))
    assert found.separate == sum(2 * len(p) + len(c) + len(r) for p, c, r in rows)
    assert found.once == sum(map(len, prompts)) + sum(len(answer) for _, answer in conversations)
    assert found.keys == sum(len(p) + len(answer) for p, answer in conversations)
