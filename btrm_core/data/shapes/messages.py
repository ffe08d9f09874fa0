"""From a value of a row to messages: one parser for the rows of training and evaluation and the records of scoring.

Decides: which roles there are and what other tools call them, how the parts of a content become one text, and what
becomes of tool calls: they are written into the text of their message, so that what an answer *does* is judged too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

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
}
_KNOWN = {"role", "content", "from", "value", "tool_calls", "function_call", "type"}
_CONTENT_KEYS = ("content", "value")
_TEXT_PARTS = ("text", "input_text", "output_text", None)


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
    if isinstance(value, dict):
        value = _rows_of_columns(value) or [value]
    if not isinstance(value, list):
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a list of messages")
    if not value:
        raise RowError("empty conversation", f"'{where}' is an empty list, expected messages")
    return [_message(item, f"{where}[{index}]", view) for index, item in enumerate(value)]


def conversation(text: str, where: str, view: RowView) -> tuple[str, list[Message]] | None:
    """Return the form and the messages of a text that spells a conversation; None for a plain text.

    A header of the assistant without a text at the end, which asks for an answer, is left out.

    Args:
        text: a text of the row.
        where: its place in the row, for the reason of a refusal.
        view: the row, which is told that the text was read back.

    Returns:
        One of the forms of `shapes/text.py`, and the messages; or None.

    Raises:
        RowError: the text looks like messages and cannot be read.
    """
    found = texts.conversation_in(text)
    if found is None:
        return None
    if found.raw is not None:
        made = [_message(item, f"{where}[{index}]", view) for index, item in enumerate(found.raw)]
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


def text_of(content: Any, where: str) -> str:
    """Return the text of a content: text, or parts whose texts are joined as chat templates do.

    Args:
        content: the content of a message.
        where: its place in the row, for the reason of a refusal.

    Returns:
        The text, as it stands.

    Raises:
        RowError: it holds anything but text, for example an image.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RowError("wrong type", f"'{where}' is {shown(content)}, expected text")
    joined = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if isinstance(part, str):
            joined.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            joined.append(part["text"])
        elif isinstance(part, dict) and part.get("type"):
            kind = str(part["type"])
            raise RowError(f"a part that is no text: {kind[:20]}", f"'{place}' is of type {kind!r}, expected text")
        else:
            raise RowError("wrong type", f"'{place}' is {shown(part)}, expected text")
    return "".join(joined)


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
    text = "" if content is None and calls else text_of(content, f"{where}.{content_key}")
    if calls:
        text = "\n".join(filter(None, [text, _written(calls)]))
        view.remark(CALLS_WRITTEN)
    view.leave_parts("messages", item, {*_KNOWN, role_key, content_key})
    return {"role": role, "content": text}


def _keys(item: Mapping[str, Any], view: RowView) -> tuple[str, str]:
    """The keys of role and text: the user's names, OpenAI's, or ShareGPT's, also mixed."""
    naming = view.naming
    role = naming.role_key if naming.role_key in item else "from" if "from" in item and "role" not in item else "role"
    if naming.content_key is not None and naming.content_key in item:
        return str(role), naming.content_key
    first = _CONTENT_KEYS if role != "from" else _CONTENT_KEYS[::-1]
    return str(role), next((key for key in first if key in item), first[0])


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
