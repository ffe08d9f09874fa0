from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btrm_core.chat.shorten import smallest, ways_to_shorten


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, OLD, ANSWER, LAST = (
    message("system", "abc"),
    message("user", "old"),
    message("assistant", "fine"),
    message("user", "last"),
)


def shortened(prompt):
    return [shorten(n) for most, shorten in ways_to_shorten(prompt) for n in range(1, most + 1)]


def test_every_way_in_order():
    assert shortened([SYSTEM, OLD, ANSWER, LAST]) == [
        ([SYSTEM, LAST], 2, 0),
        ([SYSTEM, message("user", "ast")], 2, 1),
        ([SYSTEM, message("user", "st")], 2, 2),
        ([SYSTEM, message("user", "t")], 2, 3),
        ([SYSTEM, message("user", "")], 2, 4),
        ([message("system", "bc"), message("user", "")], 2, 5),
        ([message("system", "c"), message("user", "")], 2, 6),
        ([message("system", ""), message("user", "")], 2, 7),
    ]


def test_an_exchange_begins_with_a_user_message():
    assert shortened([ANSWER, OLD, ANSWER, ANSWER, LAST])[:2] == [([OLD, ANSWER, ANSWER, LAST], 1, 0), ([LAST], 4, 0)]


def test_what_follows_the_last_user_message_stays():
    assert shortened([message("user", "ab"), ANSWER]) == [
        ([message("user", "b"), ANSWER], 0, 1),
        ([message("user", ""), ANSWER], 0, 2),
    ]


@pytest.mark.parametrize("prompt", [[], [ANSWER], [message("user", "")], [{"content": "no role"}]])
def test_nothing_to_shorten(prompt):
    assert shortened(prompt) == []


def test_the_prompt_itself_is_left_alone():
    prompt = [SYSTEM, OLD, ANSWER, LAST]
    before = [dict(m) for m in prompt]
    shortened(prompt)
    assert prompt == before


@given(st.integers(0, 500), st.integers(1, 600))
def test_smallest_finds_the_first_success_in_few_attempts(most, threshold):
    tried = []

    def attempt(n):
        tried.append(n)
        return str(n) if n >= threshold else None

    assert smallest(most, attempt) == (str(threshold) if threshold <= most else None)
    assert len(tried) <= 11
