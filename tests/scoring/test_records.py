from __future__ import annotations

import json
from typing import Any

import pytest

from btrm_core.scoring.records import Record, read_record, shortest, written

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}


def record(value: Any, line: int = 3) -> Record:
    return read_record(json.dumps(value).encode(), line)


@pytest.mark.parametrize(
    ("value", "kind", "responses"),
    [
        ({"messages": [USER, BOT], "id": 7}, "conversation", ["Hello"]),
        ([USER, BOT], "conversation", ["Hello"]),
        ({"prompt": "Hi", "response": "Hello"}, "conversation", ["Hello"]),
        ({"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "No"}]}, "pair", ["Hello", "No"]),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "pair", ["Hello", "No"]),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"}, "pair", ["A", "B"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "id": 1.5, "weight": "heavy"}, "pair", ["a", "b"]),
        ({"prompt": [USER], "responses": ["a", BOT, [BOT]], "messages": None}, "responses", ["a", "Hello", "Hello"]),
        ({"messages": [USER, BOT], "chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": ""}]}, "pair", None),
    ],
)
def test_kinds(value: Any, kind: str, responses: list[str] | None) -> None:
    found = record(value)
    assert (found.error, found.kind, found.prompt) == (None, kind, [USER])
    assert responses is None or found.responses == responses


def test_a_system_message_is_put_before_the_prompt() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert record({"prompt": "Hi", "responses": ["a"], "system": "Be brief."}).prompt == [system, USER]
    assert record({"prompt": [system, USER], "response": "a", "system": "Else."}).prompt == [system, USER]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at position 8"),
        (b"7", "the line is 7 (int), expected an object or a list of messages"),
        (b"{}", "expected 'messages', 'chosen' and 'rejected', or 'prompt' and 'responses'; the row has nothing"),
        (b"[]", "'messages' is an empty list, expected messages"),
        (b'{"messages": ["Hi"]}', "'messages[0]' is 'Hi', expected an object with 'role' and 'content'"),
        (b'[{"role": "user", "content": "x"}]', "the last message of 'messages' is from 'user', expected 'assistant'"),
        (
            b'[{"role": "judge", "content": "x"}]',
            "unknown role 'judge' in 'messages[0]', expected system, user, assistant, tool; "
            "name it with --map role.judge=user",
        ),
        (
            b'[{"role": "bot", "content": "x"}]',
            "'messages' has no message before the answer",
        ),
        (b'{"responses": ["a"]}', "missing key 'prompt': 'responses[0]' is text without its conversation"),
        (b'{"prompt": "a", "responses": []}', "'responses' is [] (list), expected a list of responses"),
        (
            b'{"prompt": "a", "responses": [{"role": "user", "content": "x"}]}',
            "the last message of 'responses[0]' is from 'user', expected 'assistant'",
        ),
        (b'{"prompt": "a", "chosen": "b"}', "missing key 'rejected' (the row has prompt, chosen)"),
    ],
)
def test_reasons(raw: bytes, reason: str) -> None:
    assert read_record(raw, 2).error == reason
    assert written(read_record(raw, 2), (), (), False)["error"] == f"line 2: {reason}"


def test_a_byte_order_mark_is_no_error() -> None:
    assert read_record(b'\xef\xbb\xbf{"prompt": "Hi", "response": "a"}', 1).error is None


def test_what_is_added_to_a_line() -> None:
    pair = record({"prompt": "Hi", "chosen": "a", "rejected": "b", "id": 1, "reward_margin": 9})
    line = written(pair, (1.5, -0.25), (None, None), True)
    assert line == {
        **{"prompt": "Hi", "chosen": "a", "rejected": "b", "id": 1, "reward_margin": 9},
        **{"chosen_reward": 1.5, "rejected_reward": -0.25, "btrm_reward_margin": 1.75, "truncated": True},
    }
    half = written(pair, (1.5, None), (None, "too long"), False)
    assert (half["chosen_reward"], half["rejected_reward"], half["btrm_reward_margin"]) == (1.5, None, None)
    assert half["error"] == "line 3: rejected: too long"
    assert written(record([USER, BOT]), (0.5,), (None,), False) == {"messages": [USER, BOT], "reward": 0.5}
    many = written(record({"prompt": "Hi", "responses": ["a", "b"]}), (0.5, None), (None, "no"), False)
    assert many["rewards"] == [0.5, None]
    assert many["error"] == "line 3: responses[1]: no"


def test_what_cannot_be_scored_keeps_its_row_with_null() -> None:
    assert written(record({"messages": 1}), (), (), False) == {
        "messages": 1,
        "reward": None,
        "error": "line 3: 'messages' is 1 (int), expected a list of messages",
    }
    none = written(record({"prompt": "Hi", "responses": ["a", "b"]}), (None, None), ("x", "x"), False)
    assert (none["rewards"], none["error"]) == ([None, None], "line 3: x")
    pair = written(record({"chosen": 1, "rejected": 2}), (), (), False)
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["reward_margin"]) == (None, None, None)


def test_a_reward_is_printed_as_short_as_float32_allows() -> None:
    import numpy as np

    value = float(np.float32(0.1))
    assert value != 0.1
    assert shortest(value) == 0.1
    assert np.float32(shortest(-1234567.9)) == np.float32(-1234567.9)
