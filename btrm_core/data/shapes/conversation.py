"""One answer of a row with all that comes before it: the prompt, the system text, earlier turns.

Decides: what the conversation of an answer is, wherever the row keeps its parts. Training, evaluation and scoring take
it from here, so that one row is one conversation everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from btrm_core.data.formats import Shape, Side
from btrm_core.data.shapes import keys
from btrm_core.data.shapes import text as texts
from btrm_core.data.shapes.messages import Message, conversation, history_messages, messages, text_of
from btrm_core.data.shapes.values import RowError, listed, shown
from btrm_core.data.shapes.view import RowView

EMPTY_ANSWER = "empty answer"
ENDS_IN_CONTROL = "answer that ends in a control token, kept as letters"
_POST_KEYS = ("post", "article")
_TEXT_KEYS = ("full_text", "text", "prompt", "question")
_WITH_INPUT = ("instruction", "prompt", "question", "query")
"""Prompts that may have their material beside them, under `input`."""

Conversation = tuple[list[Message], str]


@dataclass(frozen=True)
class Prompt:
    """What a row says comes before its answers.

    Attributes:
        messages: the conversation so far, without the row's system text; empty if the row keeps none apart.
        key: the key it stands under.
        form: the form of a text that was read back into messages.
        turns: the user's texts, where the row keeps those of a conversation and the answers to them in lists.
        blank: True if there is a prompt of nothing but space.
    """

    messages: list[Message]
    key: str = "prompt"
    form: str | None = None
    turns: tuple[str, ...] = ()
    blank: bool = False


def finished(shape: Shape, view: RowView) -> list[Conversation]:
    """Return the prompt and the answer of every side of a row, in its order.

    Args:
        shape: the answers that were found in the row.
        view: the row, which is told what was used and what is worth saying.

    Returns:
        A conversation a side: the messages before the answer, at least one, and the answer's text.

    Raises:
        RowError: one of them is no finished conversation; the reason names its place.
    """
    whole = any(side.whole for side in shape.sides)
    prompt = prompt_of(view, ("prompt",) if whole else keys.PROMPT)
    if len(prompt.messages) > 1 and prompt.messages[-1]["role"] == "assistant":  # a conversation with its answer, maybe
        answers = {side.value.strip() for side in shape.sides if isinstance(side.value, str)}
        if prompt.messages[-1]["content"].strip() in answers:
            prompt = replace(prompt, messages=prompt.messages[:-1])
    base: list[Message] = []
    made: list[Conversation] = []
    for side in shape.sides:
        found = _answer_to(base, side, view) if side.whole and made else one_side(view, prompt, side)
        base = found[0]
        made.append(found)
    return made


def _answer_to(base: list[Message], side: Side, view: RowView) -> Conversation:
    """Another answer to the prompt of a whole conversation: text, messages that go on from there, or all of them."""
    if isinstance(side.value, str):
        found = conversation(side.value, side.where, view)
        made = found[1] if found else [{"role": "assistant", "content": side.value}]
    else:
        made = messages(side.value, side.where, view)
    if made[0]["role"] not in ("assistant", "tool"):
        return one_side(view, Prompt([]), side)
    if made[-1]["role"] != "assistant":
        raise RowError("last message not from the assistant", f"the last message of '{side.where}' is no answer")
    _check_text([*base, *made])
    return [*base, *made[:-1]], made[-1]["content"]


def prompt_of(view: RowView, among: Sequence[str] = keys.PROMPT) -> Prompt:
    """Return the prompt that a row gives apart from its answers.

    Args:
        view: the row.
        among: the keys it may stand under, the first that is there.

    Returns:
        The prompt; without messages if the row has none apart, or only a blank one.

    Raises:
        RowError: it is neither text nor messages.
    """
    answers = [answer for key in ("chosen", "rejected") if isinstance(answer := view.peek(key), list)]
    keys = [key for key in among if view.has(key) and view.peek(key) not in answers]
    key = next((key for key in keys if not _is_blank(view, key)), None)
    if key is None:
        return Prompt([], blank=bool(keys))
    value = view[key]
    if key == "history" and not isinstance(value, str):
        return Prompt(history_messages(value, key, view), key)
    if key in ("info", "question", "prompt") and isinstance(value, dict) and not {"role", "from"} & set(value):
        value = _inner_text(value, key, view)
    turns = listed(value)
    if _are_texts(turns) and not _in_json(turns):
        texts_of = tuple(turn or "" for turn in turns)  # null where the arena has an empty text
        return Prompt(_earlier(view, key) + history_messages(list(texts_of), key, view), key, turns=texts_of)
    if isinstance(value, list | dict):
        return Prompt(_earlier(view, key) + messages(value, key, view), key)
    if not isinstance(value, str):
        raise RowError("wrong type", f"'{key}' is {shown(value)}, expected text or a list of messages")
    if (found := conversation(value, key, view, asks=True)) is not None:
        return Prompt(_earlier(view, key) + found[1], key, found[0])
    more = view.peek("input") if key in _WITH_INPUT else None
    if isinstance(more, str):
        view.use("input")
        value = value if more.strip() in value else f"{value}\n\n{more}"
    return Prompt([*_earlier(view, key), {"role": "user", "content": value}], key)


def one_side(view: RowView, prompt: Prompt, side: Side) -> Conversation:
    """Return the prompt and the answer of one side.

    Args:
        view: the row.
        prompt: what the row says comes before its answers.
        side: the answer, or the whole conversation that ends in it.

    Returns:
        The messages before the answer, the row's system text first, and the answer's text.

    Raises:
        RowError: it is no finished conversation, or contradicts the row's prompt.
    """
    replies = listed(side.value) if prompt.turns else None
    if isinstance(replies, list) and _are_texts(replies):
        made: str | list[Message] | None = _interleaved(prompt.turns, [r or "" for r in replies], side.where)
        prompt = Prompt([], prompt.key)
    else:
        made = _text_answer(view, prompt, side) if isinstance(side.value, str) else None
    if isinstance(made, str):
        before, answer = list(prompt.messages), made
    else:
        before, answer = _from_messages(view, prompt, side, made or messages(side.value, side.where, view))
    before = _with_system(view, before)
    if not any(message["content"].strip() for message in before if message["role"] != "system"):
        raise RowError("empty prompt", f"the prompt of '{side.where}' holds nothing but space")
    if not answer.strip():
        view.remark(EMPTY_ANSWER)
    _check_text([*before, {"role": "assistant", "content": answer}])
    return before, answer


def _text_answer(view: RowView, prompt: Prompt, side: Side) -> str | list[Message]:
    """The answer that a text is, or the messages that it spells."""
    value: str = side.value
    is_transcript = value.lstrip().startswith("Human:")
    asks = None if prompt.messages else False
    found = conversation(value, side.where, view, asks) if not (prompt.messages and is_transcript) else None
    if found is None and prompt.messages and is_transcript:
        turns = texts.transcript_turns(value)
        users = [m["content"] for m in prompt.messages if m["role"] == "user"]
        if len(turns) > 1 and users and " ".join(turns[0][1].split()) == " ".join(users[0].split()):
            found = conversation(value, side.where, view)
    if found is not None:
        return found[1]
    if not prompt.messages:
        if prompt.blank:
            raise RowError("empty prompt", f"'{prompt.key}' holds nothing but space, and '{side.where}' is one text")
        reason = f"missing key 'prompt': '{side.where}' is text without its conversation"
        raise RowError("missing key", reason)
    if prompt.form == texts.TRANSCRIPT:
        return value.strip().removeprefix("Assistant:").strip()
    if prompt.form == texts.LABELS:
        return texts.without_label(value)
    if prompt.form is not None:
        return texts.without_terminal(value).strip()
    if texts.ends_in_terminal(value):
        view.remark(ENDS_IN_CONTROL)
    return value


def _from_messages(view: RowView, prompt: Prompt, side: Side, made: list[Message]) -> Conversation:
    """Split messages into prompt and answer, and join them with the row's prompt."""
    if made[-1]["role"] != "assistant":
        raise RowError(
            "last message not from the assistant",
            f"the last message of '{side.where}' is from '{made[-1]['role']}', expected 'assistant'",
        )
    *before, answer = made
    if not prompt.messages:
        before = _earlier(view, "", before) + before
    elif made[0]["role"] in ("assistant", "tool"):
        before = [*prompt.messages, *before]
    else:
        before = _reconciled(prompt, before, answer, side.where)
    if not before:
        raise RowError("empty conversation", f"'{side.where}' has no message before the answer")
    return before, answer["content"]


def _reconciled(prompt: Prompt, before: list[Message], answer: Message, where: str) -> list[Message]:
    """The prompt of a whole conversation, checked against the prompt that the row gives apart."""
    systems = [[m for m in given if m["role"] == "system"] for given in (prompt.messages, before)]
    apart, inside = ([_normal(m) for m in given if m["role"] != "system"] for given in (prompt.messages, before))
    same = (
        inside[: len(apart)] == apart
        or inside[len(inside) - len(apart) :] == apart
        or [*inside, _normal(answer)] == apart
        or (len(apart) == 1 and apart[0] in inside)
    )
    if not same or (all(systems) and systems[0] != systems[1]):
        raise RowError("prompts differ", f"'{prompt.key}' is not the beginning of '{where}'")
    return before if systems[1] else [*systems[0], *before]


def _normal(message: Message) -> tuple[str, str]:
    return message["role"], " ".join(message["content"].split())


def _interleaved(turns: Sequence[str], replies: Sequence[str], where: str) -> list[Message]:
    if len(turns) != len(replies):
        raise RowError(
            "wrong type", f"'{where}' is {shown(list(replies))}, expected {len(turns)} texts, one for each prompt"
        )
    both = zip(turns, replies, strict=True)
    return [m for t, r in both for m in ({"role": "user", "content": t}, {"role": "assistant", "content": r})]


def _earlier(view: RowView, key: str, before: list[Message] | None = None) -> list[Message]:
    """The turns that the row keeps apart as history, unless they are the beginning of the conversation anyway."""
    history = listed(view.peek("history"))
    if key in ("history", "info") or not history or isinstance(history, str):
        return []
    made = history_messages(view["history"], "history", view)
    return [] if before and before[: len(made)] == made else made


def _with_system(view: RowView, before: list[Message]) -> list[Message]:
    system = next((value for key in keys.SYSTEM if (value := view.get(key))), None)
    if not system:
        return before
    if isinstance(system, str) and (found := conversation(system, "system", view)) and len(found[1]) == 1:
        system = found[1][0]
    if isinstance(system, dict):
        system = system.get("content", system)
    elif isinstance(system, list) and len(system) == 1 and isinstance(system[0], dict) and "role" in system[0]:
        system = system[0].get("content")
    if not isinstance(system, str | list):
        raise RowError("wrong type", f"'system' is {shown(system)}, expected text")
    text = text_of(system, "system", view)
    if not text.strip():
        return before
    if before and before[0]["role"] == "system":
        if before[0]["content"].strip() != text.strip():
            view.remark("system text not used: the conversation begins with another")
        return before
    return [{"role": "system", "content": text}, *before]


def _inner_text(value: dict[str, Any], key: str, view: RowView) -> Any:
    """The text of a prompt that is an object: a post with its title, a question with its source."""
    wanted = _POST_KEYS if key == "info" else _TEXT_KEYS
    name = next((name for name in wanted if isinstance(value.get(name), str)), None)
    if name is None:
        raise RowError("wrong type", f"'{key}' is {shown(value)}, expected text or a list of messages")
    view.leave_parts(key, value, {name, "id"})
    return value[name]


def _are_texts(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, str | None) for turn in turns)


def _in_json(turns: Sequence[str | None]) -> bool:
    return all(turn is not None and turn.lstrip().startswith("{") for turn in turns)


def _is_blank(view: RowView, key: str) -> bool:
    value = view[key] if key not in ("history", "info") else view.get(key)
    if key == "info":
        return not (isinstance(value, dict) and any(isinstance(value.get(name), str) for name in _POST_KEYS))
    return (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)


def _check_text(made: Sequence[Message]) -> None:
    """Refuse text that UTF-8 cannot hold."""
    try:
        "".join(message["content"] for message in made).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # what `surrogateescape` makes of a byte that is not UTF-8
            raise RowError("not UTF-8", f"not UTF-8: byte 0x{code - 0xDC00:02x} in the text") from error
        raise RowError("not UTF-8", f"the text holds half a surrogate pair (\\u{code:04x})") from error
