"""What a line of a file to be scored may be, and what it becomes.

==============================  ===================================  ================================================
line                            meaning                              added to it
==============================  ===================================  ================================================
{"messages": [...]}, or [...]   a conversation that ends with the    reward
                                assistant's message
{"prompt", "response"}          one response                         reward
{"chosen", "rejected"}          a pair, as for training              chosen_reward, rejected_reward, reward_margin
{"prompt", "responses": [...]}  N responses to a prompt, with or     rewards, in the order of the row (of a row with
                                without scores; also two and a       several chosen answers: these, then the others)
                                winner, and the other shapes
==============================  ===================================  ================================================

A line is understood by the parser of the training rows, with every shape and name it knows (`data/convert.py`); no
preference is needed, and the two sides of a pair may have prompts of their own.

`"truncated": true` is added where the beginning of a prompt was cut. What cannot be scored gets null for its reward and
an `error` that names the line. A line that is no JSON becomes an object with an `error` alone. Nothing of the line is
replaced: where it has a key of one of these names, what is added is called `btrm_NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from btrm_core.data import (
    Message,
    Naming,
    RowError,
    RowView,
    conversations_of,
    is_content,
    json_value,
    parse_json_line,
    shown,
)

CONVERSATION, PAIR, RESPONSES = "conversation", "pair", "responses"
OWN_NAME = "btrm_"
"""Put before the name of what is added where the line has a key of that name."""
_KINDS = {"single": CONVERSATION, "pair": PAIR}
_REWARDS: dict[str, tuple[str, ...]] = {
    CONVERSATION: ("reward",),
    PAIR: ("chosen_reward", "rejected_reward", "reward_margin"),
    RESPONSES: ("rewards",),
}
Answered = tuple[list[Message], list[str]]


@dataclass(frozen=True)
class Record:
    """One line: what it says, and the prompt with its responses, or why it cannot be scored.

    Attributes:
        line: its number in the file, from 1.
        row: the JSON object as read; empty if there is none.
        kind: one of the three kinds, or "" if that cannot be told.
        conversations: prompt and answer of every response, in the order of the row.
        error: why not.
        noted: what was understood in a way the user should know, and what was left unused.
    """

    line: int
    row: dict[str, Any]
    kind: str = ""
    conversations: Sequence[tuple[list[Message], str]] = ()
    error: str | None = None
    noted: frozenset[str] = field(default_factory=frozenset)

    @property
    def prompt(self) -> list[Message]:
        """The messages before the answer, of the first conversation."""
        return self.conversations[0][0] if self.conversations else []

    @property
    def responses(self) -> list[str]:
        """The answers."""
        return [answer for _, answer in self.conversations]

    @property
    def groups(self) -> list[Answered]:
        """The conversations with those that share a prompt together: one group, or one for each."""
        if not self.conversations:
            return []
        prompt = self.conversations[0][0]
        if all(other == prompt for other, _ in self.conversations):
            return [(prompt, [answer for _, answer in self.conversations])]
        return [(own, [answer]) for own, answer in self.conversations]


def read_record(raw: bytes, line: int, naming: Naming | None = None) -> Record:
    """Understand one line of a file.

    Args:
        raw: the line.
        line: its number, from 1.
        naming: the user's own names of columns and roles.

    >>> read_record(b'{"prompt": "2+2?", "response": "4"}', 1).groups
    [([{'role': 'user', 'content': '2+2?'}], ['4'])]
    >>> read_record(b'{"prompt": "2+2?"}', 7).error
    "expected 'messages', 'chosen' and 'rejected', or 'prompt' and 'responses'; the row has prompt"
    """
    try:
        value = parse_json_line(raw, line)
    except RowError as error:
        return Record(line, {}, error=str(error))
    return record_of(value, line, naming)


def record_of(value: Any, line: int, naming: Naming | None = None) -> Record:
    """Understand one row.

    Args:
        value: the value of a line, or the columns of a table.
        line: its number, from 1.
        naming: the user's own names of columns and roles.
    """
    row = {"messages": value} if isinstance(value, list) else value
    if not isinstance(row, dict):
        return Record(line, {}, error=f"the line is {shown(value)}, expected an object or a list of messages")
    view = RowView(row, naming)
    try:
        shape, conversations = conversations_of(view)
    except RowError as error:
        return Record(line, row, _kind(row), error=str(error))
    lost = [name for name in view.unused if name in view.parts_unused or is_content(name)]
    noted = frozenset([*view.remarks, *(f"{name} not used" for name in lost)])
    return Record(line, row, _KINDS.get(shape.kind, RESPONSES), conversations, noted=noted)


def _kind(row: dict[str, Any]) -> str:
    """What a line that cannot be scored was meant to be."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return PAIR
    if row.get("responses") is not None:
        return RESPONSES
    return CONVERSATION if row.get("messages") is not None or row.get("response") is not None else ""


def written(
    record: Record, rewards: tuple[float | None, ...], errors: tuple[str | None, ...], truncated: bool
) -> dict[str, Any]:
    """The output object of a record: its row, then the rewards of its responses and what the user should know.

    Args:
        record: the input line; its own values stay, and where a name is taken the reward's gets `btrm_` before it.
        rewards: of its responses (chosen before rejected), None where there is none; empty if nothing was scored.
        errors: why a reward is missing, as many.
        truncated: whether the prompt was cut.
    """
    added: dict[str, Any] = {}
    short = [None if reward is None else shortest(reward) for reward in rewards]
    if record.kind == CONVERSATION:
        added["reward"] = short[0] if short else None
    elif record.kind == PAIR:
        chosen, rejected = short or (None, None)
        known = chosen is not None and rejected is not None
        margin = shortest(rewards[0] - rewards[1]) if known else None  # type: ignore[operator]
        added |= {"chosen_reward": chosen, "rejected_reward": rejected, "reward_margin": margin}
    elif record.kind == RESPONSES:
        added["rewards"] = short or None
    if truncated:
        added["truncated"] = True
    if reason := record.error or _reason(record.kind, errors):
        added["error"] = f"line {record.line}: {reason}"
    row = json_value(record.row)
    named = {f"{OWN_NAME}{name}" if name in row else name: value for name, value in added.items()}
    return {**{key: value for key, value in row.items() if key not in named}, **named}


def what_was_added(line: dict[str, Any]) -> dict[str, Any]:
    """The part of an output line that `written` added, under its plain names: it stands at the end.

    Args:
        line: an output line, its keys in the order of the file.

    >>> what_was_added({"error": "mine", "reward": 7, "btrm_reward": 0.5, "truncated": True})
    {'reward': 0.5, 'truncated': True}
    """
    order = ["error", "truncated", *("reward_margin", "rejected_reward", "chosen_reward", "rewards", "reward")]
    found: dict[str, Any] = {}
    for key in reversed(line):
        name = key.removeprefix(OWN_NAME)
        if name not in order:
            break
        found = {name: line[key], **found}
        if name in ("chosen_reward", "rewards", "reward"):
            break
        order = order[order.index(name) + 1 :]
    return found


def _reason(kind: str, errors: tuple[str | None, ...]) -> str | None:
    failed = [(place, error) for place, error in enumerate(errors) if error]
    if not failed:
        return None
    if len({error for _, error in failed}) == 1 and len(failed) == len(errors):
        return failed[0][1]
    names = ("chosen", "rejected") if kind == PAIR else tuple(f"responses[{n}]" for n in range(len(errors)))
    return "; ".join(f"{names[place]}: {error}" for place, error in failed)


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32: what a reward is worth printing.

    Args:
        value: a reward.
    """
    import numpy as np

    return float(str(np.float32(value)))
