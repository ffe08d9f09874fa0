"""Edits of answers, and what they do to rewards."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from btrm_core.evaluation.probes import PROBES, probed, typos

ANSWER = "The capital of France is Paris. It lies on the Seine, and about two million people live there."


def test_every_edit_is_what_it_says():
    edited = {name: edit("Where is Paris?", ANSWER) for name, edit in PROBES.items()}
    assert len(set(edited.values())) == len(PROBES)
    assert ANSWER not in edited.values()
    assert edited["sure"] == f"Sure! {ANSWER}"
    assert edited["trailing newlines"] == f"{ANSWER}\n\n"
    assert edited["markdown"].startswith("## Answer\n\n- **The** capital")
    assert edited["prompt echo"].startswith("Where is Paris?\n\nThe capital")
    assert edited["duplicated"].count("Seine") == 2
    assert edited["truncated"] == "The capital of France is Paris. It lies on"
    assert (edited["empty"], edited["upper case"]) == ("", ANSWER.upper())


@pytest.mark.parametrize("answer", ["", " ", "one", "a\nb\n\nc", "\ud800 odd", "日本語です。"])
def test_edits_take_any_text_and_repeat_themselves(answer):
    for edit in PROBES.values():
        assert edit("p", answer) == edit("p", answer)


def test_typos_change_few_letters_of_few_words():
    text = " ".join(["ordinary sentences contain several different words"] * 50)
    changed = typos("", text)
    words = list(zip(text.split(), changed.split(), strict=True))
    assert 0.05 < np.mean([a != b for a, b in words]) < 0.25
    assert all(sorted(a) == sorted(b) and (a[0], len(a)) == (b[0], len(b)) for a, b in words)


def test_shifts_and_flips_by_hand():
    before = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    after = np.array([[2.0, 1.0], [0.0, 1.5], [0.0, 1.0], [np.nan, 1.0]])
    found = probed("x", before, after)
    spread = before[:3].std()
    assert (found.pairs, found.unscored) == (3, 1)
    assert found.shift == pytest.approx((1 - 1 + 1.5) / 6 / spread)
    assert found.moved == pytest.approx((1 + 1 + 1.5) / 6 / spread)
    assert found.flips_both == pytest.approx(1 / 3)
    assert found.flips_rejected == 0.5  # of two pairs won, 1.0 < 1.5 is lost
    assert found.flips_chosen == 0.5  # 0.0 against 0.0 is a tie
    assert found.shift_interval is not None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.zeros((3, 2)), np.ones((3, 2))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.array([[1.0, 0.0]]), np.full((1, 2), math.nan)),
        (np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])),
    ],
)
def test_nothing_to_measure_gives_none_and_no_nan(before, after):
    json.dumps(probed("x", before, after).to_dict(), allow_nan=False)
