"""What a line of a file to be scored may be, and what it becomes.

==============================  ===================================  ================================================
line                            meaning                              added to it
==============================  ===================================  ================================================
{"messages": [...]}, or [...]   a conversation that ends with the    reward
                                assistant's message
{"chosen", "rejected"}          a pair, as for training              chosen_reward, rejected_reward, reward_margin
{"prompt", "responses": [...]}  N responses to a prompt (text or     rewards, in the order of the responses
                                messages; `system` is put before)
{"prompt", "response"}          one response                         reward
==============================  ===================================  ================================================

`"truncated": true` is added where the beginning of a prompt was cut. What cannot be scored gets null for its reward and
an `error` that names the line. A line that is no JSON becomes an object with an `error` alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from btrm_core.data import ROLES, Message, RowError, convert_row, shown

CONVERSATION, PAIR, RESPONSES = "conversation", "pair", "responses"


_REWARDS: dict[str, tuple[str, ...]] = {
    CONVERSATION: ("reward",),
    PAIR: ("chosen_reward", "rejected_reward", "reward_margin"),
    RESPONSES: ("rewards",),
}


_NOT_SCORED = ("id", "subset", "margin", "weight")


_ADDED = {"truncated", "error", *(name for names in _REWARDS.values() for name in names)}


@dataclass(frozen=True)
class Record:
    """One line: what it says, and the prompt with its responses, or why it cannot be scored.

    Attributes:
        line: its number in the file, from 1.
        row: the JSON object as read; empty if there is none.
        kind: one of the three kinds, or "" if that cannot be told.
        prompt: the messages before the last.
        responses: the assistant's last messages: 1, 2 (chosen, rejected) or N.
        error: why not.
    """

    line: int
    row: dict[str, Any]
    kind: str = ""
    prompt: list[Message] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    error: str | None = None


def read_record(raw: bytes, line: int) -> Record:
    """Understand one line of a file.

    >>> read_record(b'{"prompt": "2+2?", "response": "4"}', 1).prompt
    [{'role': 'user', 'content': '2+2?'}]
    >>> read_record(b'{"prompt": "2+2?"}', 7).error
    "expected 'messages', 'chosen' and 'rejected', or 'prompt' and 'responses'; the row has prompt"
    """
    try:
        value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Record(line, {}, error=f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}")
    except (ValueError, RecursionError) as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Record(line, {}, error=f"not JSON: {getattr(error, 'msg', error)}{column}")
    row = {"messages": value} if isinstance(value, list) else value
    if not isinstance(row, dict):
        return Record(line, {}, error=f"the line is {shown(value)}, expected an object or a list of messages")
    kind = _kind(row)
    try:
        prompt, responses = _content(row, kind)
    except RowError as error:
        return Record(line, row, kind, error=str(error))
    return Record(line, row, kind, prompt, responses)


def _kind(row: dict[str, Any]) -> str:
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return PAIR
    if row.get("responses") is not None:
        return RESPONSES
    return CONVERSATION if row.get("messages") is not None or row.get("response") is not None else ""


def _content(row: dict[str, Any], kind: str) -> tuple[list[Message], list[str]]:
    if kind == PAIR:
        pair = convert_row({key: value for key, value in row.items() if key not in _NOT_SCORED})[0]
        return pair.prompt, [pair.chosen, pair.rejected]
    if kind == RESPONSES:
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise RowError("wrong type", f"'responses' is {shown(responses)}, expected a list of at least one")
        return _prompt(row), [_response(r, f"responses[{i}]") for i, r in enumerate(responses)]
    if row.get("messages") is not None:
        *prompt, last = _messages(row["messages"], "messages")
        if last["role"] != "assistant":
            raise RowError("wrong role", f"the last message is from '{last['role']}', expected 'assistant'")
        return prompt, [last["content"]]
    if row.get("response") is not None:
        return _prompt(row), [_response(row["response"], "response")]
    has = ", ".join(list(row)[:8]) or "nothing"
    raise RowError(
        "missing key",
        f"expected 'messages', 'chosen' and 'rejected', or 'prompt' and 'responses'; the row has {has}",
    )


def _prompt(row: dict[str, Any]) -> list[Message]:
    value, system = row.get("prompt"), row.get("system")
    if value is None:
        raise RowError("missing key", "missing key 'prompt': there is nothing the response answers")
    prompt = [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, "prompt")
    if isinstance(system, str) and system and prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    return prompt


def _response(value: Any, where: str) -> str:
    """The text of a response: text, or the assistant's message (alone or in a list)."""
    if isinstance(value, str):
        return value
    messages = _messages(value if isinstance(value, list) else [value], where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected text or one message of the assistant")
    return messages[0]["content"]


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a list of messages")
    messages = []
    for index, message in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowError("wrong type", f"'{place}' is {shown(message)}, expected 'role' and 'content' with text")
        if message.get("role") not in ROLES:
            role = shown(message.get("role"))
            raise RowError("unknown role", f"unknown role {role} in '{place}', expected {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def written(
    record: Record, rewards: tuple[float | None, ...], errors: tuple[str | None, ...], truncated: bool
) -> dict[str, Any]:
    """The output object of a record: its row with the rewards of its responses, and what the user should know."""
    out = {key: value for key, value in record.row.items() if key not in _ADDED}
    short = [None if reward is None else shortest(reward) for reward in rewards]
    if record.kind == CONVERSATION:
        out["reward"] = short[0] if short else None
    elif record.kind == PAIR:
        chosen, rejected = short or (None, None)
        out["chosen_reward"], out["rejected_reward"] = chosen, rejected
        known = chosen is not None and rejected is not None
        out["reward_margin"] = shortest(rewards[0] - rewards[1]) if known else None  # type: ignore[operator]
    elif record.kind == RESPONSES:
        out["rewards"] = short or None
    if truncated:
        out["truncated"] = True
    if reason := record.error or _reason(record.kind, errors):
        out["error"] = f"line {record.line}: {reason}"
    return out


def _reason(kind: str, errors: tuple[str | None, ...]) -> str | None:
    failed = [(place, error) for place, error in enumerate(errors) if error]
    if not failed:
        return None
    if len({error for _, error in failed}) == 1 and len(failed) == len(errors):
        return failed[0][1]
    names = ("chosen", "rejected") if kind == PAIR else tuple(f"responses[{n}]" for n in range(len(errors)))
    return "; ".join(f"{names[place]}: {error}" for place, error in failed)


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32: what a reward is worth printing."""
    import numpy as np

    return float(str(np.float32(value)))
