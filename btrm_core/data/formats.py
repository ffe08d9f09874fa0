"""Which answers a row holds, whatever tool the row was written for.

Finds the answers without asking which is better: that is all that scoring needs. `shapes/preference.py` says which is
preferred; `convert.py` has the table of all formats and makes pairs of what is found here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from btrm_core.data.issues import RowIssue
from btrm_core.data.shapes.named import FORMATS
from btrm_core.data.shapes.values import RowError, listed, shown
from btrm_core.data.shapes.view import RowView

WhichPairs = Literal["best-vs-worst", "best-vs-each", "all", "random"]
Ties = Literal["skip", "half"]
Row = Mapping[str, Any]
Kind = Literal["pair", "ranks", "choice", "scored", "versus", "single"]
PROMPT_KEYS = (
    *("prompt", "instruction", "question", "query", "context", "conversations", "conversation", "messages", "input"),
    *("history", "info"),
)
"""Where the prompt may stand, the first that is there; `history` if it is text, `info` if it holds a post."""
_LIST_KEYS = ("responses", "completions", "answers", "generations")
_SINGLE_KEYS = ("response", "completion", "answer", "output")
_WHOLE_KEYS = ("messages", "conversations", "conversation")
_TEXT_KEYS = ("response", "text", "content", "answer", "completion")
SCORE_KEYS = ("overall_score", "score", "rating", "fine-grained_score", "helpfulness")
_AB_KEYS = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer_0", "answer_1"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("human_ref_A", "human_ref_B"),
    ("conversation_a", "conversation_b"),
)


@dataclass(frozen=True)
class Side:
    """One answer of a row.

    Attributes:
        where: its place in the row, as messages name it.
        value: what stands there: text, a message, or messages.
        whole: True if `value` is the whole conversation, so that the row's prompt is a part of it.
    """

    where: str
    value: Any
    whole: bool = False


@dataclass(frozen=True)
class Shape:
    """The answers of a row, in the row's order.

    Attributes:
        kind: `pair` (the first is preferred), `ranks` (the first `better` are preferred to the others), `choice` (the
            row names the best), `scored`, `versus` (two and a winner) or `single` (one finished conversation).
        sides: the answers.
        key: the key of the row that holds them, or the first of two.
        better: how many are preferred, for `ranks`.
        items: the entries of the list, with their scores, for `scored`.
    """

    kind: Kind
    sides: tuple[Side, ...]
    key: str
    better: int = 1
    items: tuple[Any, ...] = ()


def group_single_responses(
    rows: Iterable[tuple[int, dict[str, Any] | RowIssue]],
) -> Iterator[tuple[int, int, dict[str, Any] | RowIssue]]:
    """Join neighbouring rows of one scored response each to the same prompt into one row with all of them.

    Args:
        rows: line and row, or line and what is wrong there.

    Yields:
        (line of the first row, number of rows joined, the row); other rows pass unchanged.
    """
    held: tuple[int, list[dict[str, Any]]] | None = None
    for line, row in rows:
        single = not isinstance(row, RowIssue) and _is_single(row)
        if held and single and _prompt_of(row) == _prompt_of(held[1][0]):
            held[1].append(row)  # type: ignore[arg-type]
            continue
        if held:
            yield held[0], len(held[1]), _joined(held[1])
            held = None
        if single:
            held = (line, [row])  # type: ignore[list-item]
        else:
            yield line, 1, row
    if held:
        yield held[0], len(held[1]), _joined(held[1])


def _is_single(row: Row) -> bool:
    has_prompt = any(row.get(key) is not None for key in PROMPT_KEYS)
    others = ("chosen", "rejected", "rejected_response", *_LIST_KEYS)
    return (
        has_prompt
        and row.get("response") is not None
        and not any(row.get(key) is not None for key in others)
        and score_key(row) is not None
    )


def _prompt_of(row: Any) -> object:
    return [row.get(key) for key in (*PROMPT_KEYS, "system", "system_prompt")]


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    key = score_key(rows[0])
    joined = {name: value for name, value in rows[0].items() if name not in ("response", key)}
    return {**joined, "responses": [r["response"] for r in rows], "scores": [r.get(key or "") for r in rows]}


def find_shape(view: RowView) -> Shape | None:
    """Find the answers of a row; None if it is in no known format.

    Args:
        view: the row, which is told which of its keys hold answers.

    Returns:
        The answers as they stand in the row, not yet read as messages; or None.

    Raises:
        RowError: it has one of two answers, its answers are no list, or it is not in the format that was named.
    """
    form = view.naming.format
    if form is not None and (key := FORMATS[form].lacks(view.has)) is not None:
        has = ", ".join(list(view)[:8]) or "nothing"
        raise RowError("another format", f"not of the format '{form}': missing key '{key}' (the row has {has})")
    for find in (_pair, _rejected_apart, _list, _versus, _single):
        if (found := find(view)) is not None:
            return found
    return None


def _pair(view: RowView) -> Shape | None:
    if not view.has("chosen") and not view.has("rejected"):
        return None
    for key in ("chosen", "rejected"):
        if not view.has(key):
            raise view.missing(key)
    chosen, rejected = view["chosen"], view["rejected"]
    for key in _WHOLE_KEYS:
        if isinstance(view.peek(key), list) and view.peek(key) in (chosen, rejected):
            view.use(key)  # the same conversation once more
    if not (_is_choice(chosen) or _is_choice(rejected)):
        return Shape("pair", (Side("chosen", chosen), Side("rejected", rejected)), "chosen")
    better, worse = (
        [Side(f"{key}[{i}]", item) for i, item in enumerate(value)] if _is_choice(value) else [Side(key, value)]
        for key, value in (("chosen", chosen), ("rejected", rejected))
    )
    if len(better) == len(worse) == 1:
        return Shape("pair", (*better, *worse), "chosen")
    return Shape("ranks", (*better, *worse), "chosen", len(better))


def _is_choice(value: Any) -> bool:
    """True for a list of answers: texts (that are no messages in JSON) or conversations."""
    value = listed(value) if isinstance(value, str) and value.lstrip().startswith('["') else value
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, str) for item in value):
        return not all(item.lstrip().startswith("{") and '"role"' in item for item in value)
    return all(isinstance(item, list) for item in value)


def _rejected_apart(view: RowView) -> Shape | None:
    """A finished conversation or response, and the other answer under a name of its own."""
    key = next((key for key in ("rejected_response", "rejected_messages") if view.has(key)), None)
    if key is None:
        return None
    whole = next((name for name in _WHOLE_KEYS if view.has(name)), None)
    if whole is None:
        response = view.get("response")
        if response is None:
            raise view.missing("messages")
        return Shape("pair", (Side("response", response), Side(key, view[key])), "response")
    return Shape("pair", (Side(whole, view[whole], whole=True), Side(key, view[key], whole=True)), whole)


def _list(view: RowView) -> Shape | None:
    outputs = listed(view.peek("output"))
    if isinstance(outputs, list) and outputs and all(isinstance(item, str) for item in outputs):
        view.use("output")
        if len(outputs) != 2:
            raise RowError("wrong type", f"'output' holds {len(outputs)} answers, expected two: chosen and rejected")
        return Shape("pair", tuple(Side(f"output[{i}]", item) for i, item in enumerate(outputs)), "output")
    key = next((key for key in (*_LIST_KEYS, "summaries") if view.has(key)), None)
    if key is None:
        return None
    items = listed(view[key])
    if not isinstance(items, list) or not items:
        raise RowError("wrong type", f"'{key}' is {shown(items)}, expected a list of responses")
    sides = tuple(Side(f"{key}[{i}]", _text(item, f"{key}[{i}]")) for i, item in enumerate(items))
    for item in items:
        if isinstance(item, dict) and "role" not in item:
            view.leave_parts(key, item, {*_TEXT_KEYS, "rank", score_key(item)} - {None})  # type: ignore[arg-type]
    return Shape("choice" if key == "summaries" else "scored", sides, key, items=tuple(items))


def _versus(view: RowView) -> Shape | None:
    for first, second in _AB_KEYS:
        if view.has(first) and view.has(second):
            return Shape("versus", (Side(first, view[first]), Side(second, view[second])), first)
    return None


def _single(view: RowView) -> Shape | None:
    key = next((key for key in _SINGLE_KEYS if view.has(key)), None)
    if key is not None:
        return Shape("single", (Side(key, view[key]),), key)
    whole = next((key for key in _WHOLE_KEYS if view.has(key)), None)
    return None if whole is None else Shape("single", (Side(whole, view[whole], whole=True),), whole)


def score_key(row: Row) -> str | None:
    """Return the key of a row, or of an entry of a list, that holds its score; None if there is none.

    Args:
        row: the row or the entry.
    """
    return next((key for key in SCORE_KEYS if row.get(key) is not None), None)


def _text(item: Any, where: str) -> Any:
    if isinstance(item, dict) and "role" not in item and "from" not in item:
        for key in _TEXT_KEYS:
            if item.get(key) is not None:
                return item[key]
        raise RowError("missing key", f"'{where}' has no text: expected one of {', '.join(_TEXT_KEYS)}")
    return item
