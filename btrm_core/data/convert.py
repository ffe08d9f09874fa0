r"""From a row in any of the accepted formats to pairs in btrm's form.

The format is recognised per row, so one file may mix them:

============================  ===============================================================================
keys of the row               meaning
============================  ===============================================================================
chosen, rejected              lists of messages that share all but the last one (the standard format), or
                              transcripts ("\n\nHuman: ... \n\nAssistant: ...", as HH-RLHF has them)
prompt, chosen, rejected      prompt: text, messages or transcript; the answers: text, a message, or messages
                              (whole conversations may repeat the prompt)
responses, scores             with a prompt: scored responses; also `completions` of UltraFeedback and
                              `answers` with ranks; `response` + `score` (or `helpfulness`) where the rows of
                              one prompt follow each other, as in HelpSteer
response_a, response_b        with a prompt and a `winner` ("a", "b", "tie"); also response_0/_1 with
                              better_response_id, response1/2 with overall_preference or preference_strength,
                              answer_0/_1 with score_0/_1, conversation_a/_b with winner
============================  ===============================================================================

The prompt may be called prompt, instruction (with input), question, context, conversations or messages; `system` (or
`system_prompt`) is put before it. `margin`, `weight`, `subset` and `id` are optional everywhere, and so is
`probability` beside two answers: how likely it is that the preferred one is better, from 0.5 to 1 (a soft label).

Scored responses give one pair by default: the best against the worst, the clearest label there is, and no
prompt counts more than another. "best-vs-each" pairs the best with every worse one, "all" makes every pair
of unequal scores; the pairs of one prompt then weigh 1 together, as in InstructGPT (arXiv:2203.02155).
Equal scores and declared ties hold no preference: they are skipped and counted, unless ties are to count half
(a pair whose answers are equally likely the better one, half a win for each as in Davidson 1970).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from btrm_core.data.formats import PROMPT_KEYS, Row, RowError, Ties, WhichPairs, finite, shown, sides

Message = dict[str, str]


ROLES = ("system", "user", "assistant")


_OWN_ROLES = {name: name for name in ROLES}


_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


_TRANSCRIPT = re.compile(r"\s*Human:")


_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with a preferred and a less preferred answer.

    Attributes:
        id: the row's own id, or `file:line`; `#k` is added where a row gives several pairs.
        subset: the row's own subset, or the source's name.
        prompt: all messages but the last, at least one.
        chosen: text of the preferred answer, the last message of the assistant.
        rejected: text of the other answer.
        margin: by how much chosen should win, if the row says so (used by the loss only when asked to).
        weight: how much the pair counts in the loss, above 0.
        probability: how likely it is that chosen is the better answer, 0.5 (a tie) to 1.
        group: a number that only the pairs of one row share, which compare several responses; 0 for a lone pair.
    """

    id: str
    subset: str
    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    weight: float = 1.0
    probability: float = 1.0
    group: int = 0

    @property
    def chosen_conversation(self) -> list[Message]:
        """The prompt followed by the preferred answer."""
        return [*self.prompt, {"role": "assistant", "content": self.chosen}]

    @property
    def rejected_conversation(self) -> list[Message]:
        """The prompt followed by the other answer."""
        return [*self.prompt, {"role": "assistant", "content": self.rejected}]


def convert_row(
    row: Row,
    *,
    name: str = "row",
    line: int = 0,
    subset: str = "",
    scored: WhichPairs = "best-vs-worst",
    ties: Ties = "skip",
    group: int = 1,
) -> list[Pair]:
    """Return the pairs of one row; at least one.

    Args:
        row: the row as read.
        name: short name of the source, for the id of a row that has none.
        line: its line, likewise.
        subset: subset of a row that names none.
        scored: which pairs scored responses give; see the module.
        ties: "half" makes pairs of ties, with probability 0.5; "skip" refuses them.
        group: number of the row, for its pairs if there are several.

    Raises:
        RowError: the row gives no pair; the reason names the key and the value.

    >>> convert_row({"prompt": "2+2?", "chosen": "4", "rejected": "5"})[0].prompt
    [{'role': 'user', 'content': '2+2?'}]
    """
    compared = sides(row, scored, ties)
    identity = _label(row, "id") or f"{name}:{line}"
    part = _label(row, "subset") or subset
    margin = _number(row, "margin")
    weight = _number(row, "weight")
    if weight is not None and weight <= 0:
        raise RowError("wrong type", f"'weight' is {weight:g}, expected a number above 0")
    pairs = []
    several = len(compared) > 1
    for number, (chosen, rejected, sure) in enumerate(compared):
        prompt, better = _split(row, *chosen)
        other, worse = _split(row, *rejected)
        _check(prompt, better, other, worse, chosen[0], rejected[0])
        suffix = f"#{number}" if several else ""
        share = (1.0 if weight is None else weight) / len(compared)
        own = group if several else 0
        pairs.append(Pair(identity + suffix, part, prompt, better, worse, margin, share, sure, own))
    return pairs


def _split(row: Row, key: str, value: Any) -> tuple[list[Message], str]:
    """The prompt and the answer of one side."""
    prompt, is_transcript = _prompt(row)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        if prompt:
            return prompt, value.strip() if is_transcript else value
        if not _TRANSCRIPT.match(value):
            raise RowError("missing key", f"missing key 'prompt': '{key}' is text without its conversation")
        messages = parse_transcript(value, key)
    else:
        messages = _messages(value, key)
    if messages[-1]["role"] != "assistant":
        raise RowError(
            "last message not from the assistant",
            f"the last message of '{key}' is from '{messages[-1]['role']}', expected 'assistant'",
        )
    *before, answer = messages
    if prompt and messages[0]["role"] == "assistant":
        before = [*prompt, *before]
    elif prompt and isinstance(row.get("prompt"), list) and before[: len(prompt)] != prompt:
        raise RowError("prompts differ", f"'prompt' is not the beginning of '{key}'")
    if not before:
        raise RowError("empty conversation", f"'{key}' has no message before the answer")
    return _with_system(row, before), answer["content"]


def _prompt(row: Row) -> tuple[list[Message], bool]:
    """The prompt that the row gives apart from the answers (may be empty), and whether it is a transcript."""
    key = next((key for key in PROMPT_KEYS if row.get(key) is not None), None)
    value = row[key] if key else None
    if key is None or value == "":
        return [], False
    if isinstance(value, list):
        return _with_system(row, _messages(value, key)), False
    if not isinstance(value, str):
        raise RowError("wrong type", f"'{key}' is {shown(value)}, expected text or a list of messages")
    if _TRANSCRIPT.match(value):
        messages = parse_transcript(value, key)
        if messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()
        return _with_system(row, messages), True
    if key == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        value = f"{value}\n\n{row['input']}"
    return _with_system(row, [{"role": "user", "content": value}]), False


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    system = row.get("system") or row.get("system_prompt")
    if not system or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise RowError("wrong type", f"'system' is {shown(system)}, expected text")
    return [{"role": "system", "content": system}, *messages]


def parse_transcript(text: str, key: str = "chosen") -> list[Message]:
    r"""Split a transcript into messages, each stripped of the space around it.

    Raises:
        RowError: the text does not begin with "Human:" or "Assistant:".

    >>> parse_transcript("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    head, *parts = _TURN.split(text)
    if head or not parts:
        raise RowError("wrong type", f"'{key}' is not a transcript: expected it to begin with 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": content.strip()} for who, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong type", f"'{key}' is {shown(value)}, expected a list of messages")
    if not value:
        raise RowError("empty conversation", f"'{key}' is an empty list, expected messages")
    return [_message(message, f"{key}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError("wrong type", f"'{where}' is {shown(message)}, expected an object with 'role' and 'content'")
    sharegpt = "from" in message and "role" not in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    for key in (role_key, content_key):
        if key not in message:
            raise RowError("missing key", f"missing key '{key}' in '{where}'")
    role, content = message[role_key], message[content_key]
    if not isinstance(content, str):
        raise RowError("wrong type", f"'{where}.{content_key}' is {shown(content)}, expected text")
    known = _SHAREGPT_ROLES if sharegpt else _OWN_ROLES
    if not isinstance(role, str) or role not in known:
        raise RowError("unknown role", f"unknown role {shown(role)} in '{where}', expected {', '.join(known)}")
    return {"role": known[role], "content": content}


def _check(prompt: list[Message], better: str, other: list[Message], worse: str, left: str, right: str) -> None:
    if prompt != other:
        raise RowError(
            "prompts differ", f"'{left}' and '{right}' differ before the last message: {_where(prompt, other)}"
        )
    if better == worse:
        raise RowError("chosen equals rejected", f"'{left}' and '{right}' are the same answer: {shown(better)}")
    try:
        "".join([better, worse, *(message["content"] for message in prompt)]).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of a byte that is not UTF-8
            raise RowError("not UTF-8", f"not UTF-8: byte 0x{code - 0xDC00:02x} in the text") from error
        raise RowError("not UTF-8", f"the text holds half a surrogate pair (\\u{code:04x})") from error


def _where(left: list[Message], right: list[Message]) -> str:
    if len(left) != len(right):
        return f"{len(left)} messages against {len(right)}"
    index = next(i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
    return f"message {index + 1} of {len(left)}"


def _label(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("wrong type", f"'{key}' is {shown(value)}, expected text or a whole number")
    return str(value)


def _number(row: Row, key: str) -> float | None:
    return None if row.get(key) is None else finite(row[key], key)
