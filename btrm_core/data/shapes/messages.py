"""From a value of a row to messages: one parser for the rows of training and evaluation and the records of scoring.

Decides: which roles there are and what other tools call them, how the parts of a content become one text, and what
becomes of tool calls: they are written into the text of their message, so that what an answer *does* is judged too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from btrm_core.data.shapes import keys
from btrm_core.data.shapes import text as texts
from btrm_core.data.shapes.naming import ROLES
from btrm_core.data.shapes.text import ROLE_NAMES
from btrm_core.data.shapes.values import RowError, listed, plain, shown
from btrm_core.data.shapes.view import RowView

Message = dict[str, str]

CALLS_WRITTEN = "tool calls written into the text of their message"
READ_BACK = {
    texts.SERIALISED: "text that is a list of messages, read as messages",
    texts.TEMPLATE: "finished chat template, read back into messages",
    texts.TURNS: "text with <extra_id_1> turns, read back into messages",
    texts.LABELS: "text with the labels of a conversation (USER:, ### Instruction:, ...), read back into messages",
}
RESULTS_WRITTEN = "results of tools that are objects, written as JSON"
_KNOWN = {"tool_calls", "function_call", "type"}
_ROLE_KEYS = ("role", "from", "speaker", "sender")
_CONTENT_KEYS = ("content", "value", "text", "parts", "refusal")
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_DEEPEST = 9
"""How many lists a part may be in: a result of a tool may hold parts, but no row goes deeper than Python can call."""
_TURNS_OF_TWO = (("input", "output"), ("question", "answer"), ("instruction", "response"))


def messages(value: Any, where: str, view: RowView) -> list[Message]:
    """Return the messages of a value: a list of them, one alone, columns of them, or JSON of any of these.

    Args:
        value: what the row holds; text is read as JSON, a transcript or a finished template.
        where: its place in the row, for the reason of a refusal.
        view: the row, which is told what was left unused and what is worth saying.

    Returns:
        At least one message, each a dictionary of `role` (one of the four) and `content` (text).

    Raises:
        RowError: it cannot be read as messages; the reason names the place and the value.
    """
    value = plain(value) if not isinstance(value, str | list | dict) else value
    if isinstance(value, str):
        found = conversation(value, where, view)
        if found is None:
            raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a list of messages")
        return found[1]
    if isinstance(value, dict) and (
        whole := next((key for key in keys.WHOLE if isinstance(value.get(key), list)), None)
    ):
        view.leave_parts(where, value, {whole, "system"})
        inner = messages(value[whole], f"{where}.{whole}", view)
        system = value.get("system")
        if isinstance(system, str) and system.strip() and inner[0]["role"] != "system":
            return [{"role": "system", "content": system}, *inner]
        return inner
    if isinstance(value, dict):
        value = _rows_of_columns(value) or [value]
    if not isinstance(value, list):
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a list of messages")
    if not value:
        raise RowError("empty conversation", f"'{where}' is an empty list, expected messages")
    return [_message(item, f"{where}[{index}]", view) for index, item in enumerate(_single_turns(value, view))]


def _single_turns(items: list[Any], view: RowView) -> list[Any]:
    """Messages of the forms that name no role: {"user": text}, [role, text], {"input": question, "output": answer}."""
    made: list[Any] = []
    for item in items:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and item[0].lower() in ROLE_NAMES:
            made.append({"role": item[0], "content": item[1]})
        elif isinstance(item, dict) and len(item) == 1 and (role := next(iter(item))).lower() in ROLE_NAMES:
            made.append({"role": role, "content": item[role]})
        elif isinstance(item, dict) and (both := next((two for two in _TURNS_OF_TWO if {*two} <= set(item)), None)):
            question, answer = both
            view.leave_parts("messages", item, both)
            made.append({"role": "user", "content": item[question]})
            made += [{"role": "assistant", "content": item[answer]}] if item[answer] is not None else []
        else:
            made.append(item)
    return made


def conversation(text: str, where: str, view: RowView, asks: bool | None = None) -> tuple[str, list[Message]] | None:
    """Return the form and the messages of a text that spells a conversation; None for a plain text.

    A header of the assistant without a text at the end, which asks for an answer, is left out.

    Args:
        text: a text of the row.
        where: its place in the row, for the reason of a refusal.
        view: the row, which is told that the text was read back.
        asks: whether labelled turns (USER:, ASSISTANT:) that end by asking the assistant are a conversation, or those
            that do not; None: neither.

    Returns:
        One of the forms of `shapes/text.py`, and the messages; or None.

    Raises:
        RowError: the text looks like messages and cannot be read.
    """
    found = texts.conversation_in(text)
    if found is None and asks is not None and (turns := texts.labelled_turns(text, asks=asks)):
        found = texts.Found(texts.LABELS, tuple(turns))
    if found is None:
        return None
    if found.raw is not None:
        made = messages(found.raw, where, view)
    else:
        made = [{"role": _role(role, where, view), "content": content} for role, content in found.turns]
    if len(made) > 1 and made[-1] == {"role": "assistant", "content": ""}:
        made.pop()
    if found.form in READ_BACK:
        view.remark(READ_BACK[found.form])
    return found.form, made


def history_messages(value: Any, where: str, view: RowView) -> list[Message]:
    """Return the earlier turns that a row keeps apart: pairs of a question and its answer, or messages.

    Args:
        value: what stands there; texts alone are the user's and the assistant's by turns.
        where: its place in the row, for the reason of a refusal.
        view: the row.

    Returns:
        The messages; none for an empty list.

    Raises:
        RowError: it is neither.
    """
    value = listed(value)
    if isinstance(value, list) and all(isinstance(item, list) for item in value):
        made: list[Message] = []
        for index, item in enumerate(value):
            texts_of = [part for part in item if part is not None]
            if len(item) != 2 or not all(isinstance(part, str) for part in texts_of):
                raise RowError("wrong type", f"'{where}[{index}]' is {shown(item)}, expected a question and its answer")
            roles = ("user", "assistant")
            made += [{"role": r, "content": t} for r, t in zip(roles, item, strict=True) if t is not None]
        return made
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [{"role": ("user", "assistant")[n % 2], "content": item} for n, item in enumerate(value)]
    return messages(value, where, view)


def text_of(content: Any, where: str, view: RowView) -> str:
    """Return the text of a content: text, or parts whose texts are joined as chat templates do.

    Calls of tools that are parts, and their results, are written into the text.

    Args:
        content: the content of a message.
        where: its place in the row, for the reason of a refusal.
        view: the row, which is told what was written.

    Returns:
        The text, as it stands.

    Raises:
        RowError: it holds anything but text, for example an image.
    """
    if isinstance(content, bytes):
        content = plain(content)
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RowError("wrong type", f"'{where}' is {shown(content)}, expected text")
    return "".join(_part(part, f"{where}[{index}]", view) for index, part in enumerate(content))


def _part(part: Any, where: str, view: RowView) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("wrong type", f"'{where}' is {shown(part)}, expected text")
    kind = part.get("type")
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind == "tool_use":
        view.remark(CALLS_WRITTEN)
        return _written({"name": part.get("name"), "arguments": part.get("input")})
    if kind == "tool_result" and where.count("[") < _DEEPEST:
        return text_of(part.get("content") or "", f"{where}.content", view)
    if kind:
        raise RowError(
            f"a part that is no text: {str(kind)[:20]}", f"'{where}' is of type {str(kind)!r}, expected text"
        )
    raise RowError("wrong type", f"'{where}' is {shown(part)}, expected text")


def _rows_of_columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Messages from columns of equal length ({"role": [...], "content": [...]}), as `datasets` keeps sequences."""
    columns = {key: list(column) for key, column in value.items() if isinstance(column, list)}
    roles = columns.get("role", columns.get("from"))
    if not roles or not all(isinstance(role, str) for role in roles):
        return None
    same = {key: column for key, column in columns.items() if len(column) == len(roles)}
    return [dict(zip(same, cells, strict=True)) for cells in zip(*same.values(), strict=True)]


def _message(item: Any, where: str, view: RowView) -> Message:
    if isinstance(item, str) and item.lstrip().startswith("{"):
        try:
            item = json.loads(item)
        except (ValueError, RecursionError):
            item = str(item)
        else:
            view.remark(READ_BACK[texts.SERIALISED])
    if not isinstance(item, dict):
        raise RowError("wrong type", f"'{where}' is {shown(item)}, expected an object with 'role' and 'content'")
    role_key, content_key = _keys(item, view)
    if role_key not in item:
        raise RowError("missing key", f"missing key '{role_key}' in '{where}'")
    calls = item.get("tool_calls") or item.get("function_call")
    if content_key not in item and not calls:
        raise RowError("missing key", f"missing key '{content_key}' in '{where}'")
    role = _role(item[role_key], where, view)
    content = item.get(content_key)
    if role == "tool" and isinstance(content, dict) and "type" not in content and "text" not in content:
        view.remark(RESULTS_WRITTEN)
        content = json.dumps(content, ensure_ascii=False, default=str)
    text = "" if content is None and calls else text_of(content, f"{where}.{content_key}", view)
    if calls:
        text = "\n".join(filter(None, [text, _written(calls)]))
        view.remark(CALLS_WRITTEN)
    view.leave_parts("messages", item, {*_KNOWN, role_key, content_key})
    return {"role": role, "content": text}


def _keys(item: Mapping[str, Any], view: RowView) -> tuple[str, str]:
    """The keys of role and text: the user's names, OpenAI's, or another tool's, also mixed."""
    naming = view.naming
    role = naming.role_key if naming.role_key in item else next((key for key in _ROLE_KEYS if key in item), "role")
    if naming.content_key is not None and naming.content_key in item:
        return str(role), naming.content_key
    wanted = _CONTENT_KEYS if role != "from" else ("value", *_CONTENT_KEYS)
    held = [key for key in wanted if item.get(key) is not None] or [key for key in wanted if key in item]
    return str(role), held[0] if held else wanted[0]


def _role(role: Any, where: str, view: RowView) -> str:
    if isinstance(role, str):
        name = role.strip().lower()
        known = dict(view.naming.roles).get(name) or ROLE_NAMES.get(name)
        if known:
            return known
    hint = f"; name it with --map role.{role}=user" if isinstance(role, str) and role.isidentifier() else ""
    raise RowError("unknown role", f"unknown role {shown(role)} in '{where}', expected {', '.join(ROLES)}{hint}")


def _written(calls: Any) -> str:
    """Tool calls as text, each in JSON between tags, the form that Hermes and Qwen use."""
    calls = listed(calls)
    lines = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict):
            inner = call["function"] if isinstance(call.get("function"), dict) else call
            call = {key: value for key, value in inner.items() if value is not None and key not in ("id", "type")}
        lines.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False, default=str)}\n</tool_call>")
    return "\n".join(lines)
