"""Which answers a row holds, whatever tool the row was written for.

Finds the answers without asking which is better: that is all that scoring needs. `shapes/preference.py` says which is
preferred; `convert.py` has the table of all formats and makes pairs of what is found here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from btrm_core.data.issues import RowIssue
from btrm_core.data.shapes import keys
from btrm_core.data.shapes.named import FORMATS
from btrm_core.data.shapes.values import RowError, as_number, listed, shown
from btrm_core.data.shapes.view import RowView

WhichPairs = Literal["best-vs-worst", "best-vs-each", "all", "random"]
Ties = Literal["skip", "half"]
Row = Mapping[str, Any]
Kind = Literal["pair", "ranks", "choice", "scored", "versus", "single"]


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
    if not isinstance(row.get(_single_key(row) or ""), str | list) or score_key(row) is None:
        return False
    others = (*itertools.chain(*keys.PAIR), "rejected_response", *keys.LISTS)
    return (
        any(row.get(key) is not None for key in keys.PROMPT)
        and not any(row.get(key) is not None for key in others)
        and not any(row.get(second) is not None for key in row if (second := keys.VERSUS.get(key)))
    )


def _single_key(row: Row) -> str | None:
    return next((key for key in keys.SINGLE if row.get(key) is not None), None)


def _prompt_of(row: Any) -> object:
    return [_single_key(row), *(row.get(key) for key in (*keys.PROMPT, *keys.SYSTEM))]


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    key, answer = score_key(rows[0]), str(_single_key(rows[0]))
    joined = {name: value for name, value in rows[0].items() if name not in (answer, key)}
    return {**joined, "responses": [r[answer] for r in rows], "scores": [r.get(key or "") for r in rows]}


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
            if any(isinstance(side.value, dict) for side in found.sides):
                return replace(found, sides=tuple(_unwrapped(side, view) for side in found.sides))
            return found
    return None


def _pair(view: RowView) -> Shape | None:
    names = next((names for names in keys.PAIR if view.has(names[0]) and view.has(names[1])), None)
    if names is None:
        for key, other in (keys.PAIR[0], keys.PAIR[0][::-1]):
            if view.has(key):
                raise view.missing(other)
        return None
    chosen, rejected = (view[name] for name in names)
    for key in keys.WHOLE:
        if isinstance(view.peek(key), list) and view.peek(key) in (chosen, rejected):
            view.use(key)  # the same conversation once more
    as_lists = listed(chosen), listed(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str) and all(map(_is_choice, as_lists)):
        view.remark("text that is a list of answers, read as answers")
        chosen, rejected = as_lists
    if not (_is_choice(chosen) or _is_choice(rejected)):
        return Shape("pair", (Side(names[0], chosen), Side(names[1], rejected)), names[0])
    better, worse = (
        [Side(f"{key}[{i}]", item) for i, item in enumerate(value)] if _is_choice(value) else [Side(key, value)]
        for key, value in zip(names, (chosen, rejected), strict=True)
    )
    if len(better) == len(worse) == 1:
        return Shape("pair", (*better, *worse), names[0])
    return Shape("ranks", (*better, *worse), names[0], len(better))


def _is_choice(value: Any) -> bool:
    """True for a list of answers: texts (that are no messages in JSON) or conversations."""
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
    whole = next((name for name in keys.WHOLE if view.has(name)), None)
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
    key = next((key for key in (*keys.LISTS, "summaries") if view.has(key)), None)
    if key is None:
        return None
    items = listed(view[key])
    if not isinstance(items, list) or not items:
        raise RowError("wrong type", f"'{key}' is {shown(items)}, expected a list of responses")
    sides = tuple(Side(f"{key}[{i}]", item) for i, item in enumerate(items))
    return Shape("choice" if key == "summaries" else "scored", sides, key, items=tuple(items))


def _versus(view: RowView) -> Shape | None:
    firsts = [key for key in view if view.has(key) and view.has(keys.VERSUS.get(key, ""))]
    if not firsts:
        return None
    first = min(firsts, key=list(keys.VERSUS).index)
    both = (first, keys.VERSUS[first])
    return Shape("versus", tuple(Side(name, _judged_part(view[name], name, view)) for name in both), first)


def _judged_part(value: Any, where: str, view: RowView) -> Any:
    """A conversation up to the answer that was judged, where the row counts its turns (MT-bench)."""
    turn = as_number(view.peek("turn"))
    if not where.startswith("conv") or turn is None or turn < 1 or not isinstance(value, list):
        return value
    view.use("turn")
    answers = [place for place, item in enumerate(value) if isinstance(item, dict) and item.get("role") == "assistant"]
    if len(answers) <= turn:
        return value
    view.remark("turns after the one that was judged, left out")
    return value[: answers[int(turn) - 1] + 1]


def _single(view: RowView) -> Shape | None:
    key = next((key for key in keys.SINGLE if view.has(key)), None)
    if key is not None:
        return Shape("single", (Side(key, view[key]),), key)
    whole = next((key for key in keys.WHOLE if view.has(key)), None)
    return None if whole is None else Shape("single", (Side(whole, view[whole], whole=True),), whole)


def score_key(row: Row) -> str | None:
    """Return the key of a row, or of an entry of a list, that holds its score; None if there is none.

    Args:
        row: the row or the entry.
    """
    return next((key for key in keys.SCORES if row.get(key) is not None), None)


def _unwrapped(side: Side, view: RowView) -> Side:
    """An answer that is an object with its score or its model: what it holds of text; any other as it stands."""
    item = side.value
    if not isinstance(item, dict) or {"role", "from", *keys.WHOLE} & set(item):
        return side
    key = next((key for key in keys.TEXT if item.get(key) is not None), None)
    if key is None:
        raise RowError("missing key", f"'{side.where}' has no text: expected one of {', '.join(keys.TEXT)}")
    view.leave_parts(side.where.partition("[")[0], item, {*keys.TEXT, "rank", score_key(item) or key})
    return replace(side, value=item[key])
