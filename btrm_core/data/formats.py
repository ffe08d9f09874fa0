"""Which answers of a row are compared, in the formats that do not say "chosen" and "rejected" themselves.

Scored responses, A/B rows with a winner, and rows of one scored response each are turned into sides: the
place and the value of the preferred and of the other answer. `convert.py` has the table of all formats and
makes pairs of the sides.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from btrm_core.data.issues import RowIssue

WhichPairs = Literal["best-vs-worst", "best-vs-each", "all"]


Ties = Literal["skip", "half"]


Row = Mapping[str, Any]


Side = tuple[str, Any]  # key of the row (for messages) and the answer or conversation found there


Compared = tuple[Side, Side, float]  # chosen, rejected, probability that chosen is the better one


TIED = 0.5


PROMPT_KEYS = ("prompt", "instruction", "question", "context", "conversations", "messages")


_LIST_KEYS = ("responses", "completions", "answers")


_TEXT_KEYS = ("response", "text", "content", "answer", "completion")


_SCORE_KEYS = ("overall_score", "score", "rating", "fine-grained_score", "helpfulness")


_WINNER_KEYS = ("winner", "better_response_id", "preference")


_SIGNED_KEYS = ("overall_preference", "preference_strength")


_AB_KEYS = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer_0", "answer_1"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
)


class RowError(ValueError):
    """The row gives no pair; `kind` is what it is counted under, `bad` False for a tie and the like."""

    def __init__(self, kind: str, reason: str, *, bad: bool = True):
        super().__init__(reason)
        self.kind = kind
        self.bad = bad


def group_single_responses(
    rows: Iterable[tuple[int, dict[str, Any] | RowIssue]],
) -> Iterator[tuple[int, int, dict[str, Any] | RowIssue]]:
    """Join neighbouring rows of one scored response each to the same prompt into one row with all of them.

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
    return has_prompt and "response" in row and "chosen" not in row and _score_key(row) is not None


def _prompt_of(row: Any) -> object:
    return [row.get(key) for key in (*PROMPT_KEYS, "input", "system", "system_prompt")]


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    key = _score_key(rows[0])
    joined = {name: value for name, value in rows[0].items() if name != "response"}
    return {**joined, "responses": [r["response"] for r in rows], "scores": [r.get(key or "") for r in rows]}


def sides(row: Row, scored: WhichPairs, ties: Ties = "skip") -> list[Compared]:
    """Return the (chosen, rejected) sides of a row, whatever its format; at least one.

    Raises:
        RowError: the row is in no known format, names no winner, or is a tie and ties do not count half.
    """
    if row.get("chosen") is not None or row.get("rejected") is not None:
        for key in ("chosen", "rejected"):
            if row.get(key) is None:
                raise missing(row, key)
        return [(("chosen", row["chosen"]), ("rejected", row["rejected"]), _probability(row))]
    for key in _LIST_KEYS:
        if row.get(key) is not None:
            return _scored(row, key, scored, ties)
    for first, second in _AB_KEYS:
        if row.get(first) is not None and row.get(second) is not None:
            winner = _winner(row, first, second)
            if winner == 0 and ties == "skip":
                raise RowError("tie", f"'{first}' and '{second}' are tied, no preference", bad=False)
            left, right = (first, row[first]), (second, row[second])
            sure = TIED if winner == 0 else _probability(row)
            return [(left, right, sure) if winner <= 0 else (right, left, sure)]
    raise missing(row, "chosen")


def _probability(row: Row) -> float:
    """How sure it is that the chosen answer is the better one; 1 unless the row says less."""
    if row.get("probability") is None:
        return 1.0
    value = finite(row["probability"], "probability")
    if not TIED <= value <= 1:
        hint = "; swap chosen and rejected" if 0 <= value < TIED else ""
        raise RowError(
            "wrong type", f"'probability' is {value:g}, expected 0.5 (a tie) to 1 that chosen is better{hint}"
        )
    return value


def _scored(row: Row, key: str, mode: WhichPairs, ties: Ties) -> list[Compared]:
    items = row[key]
    if not isinstance(items, list) or not items:
        raise RowError("wrong type", f"'{key}' is {shown(items)}, expected a list of responses")
    if len(items) == 1:
        raise RowError("only one response", f"'{key}' holds one response, nothing to compare", bad=False)
    scores = _scores(row, key, items)
    order = sorted(range(len(items)), key=lambda index: -scores[index])  # stable: first of equals first
    best, worst = order[0], min(range(len(items)), key=lambda index: scores[index])
    if mode == "best-vs-worst":
        wanted = [(best, worst)]
    elif mode == "best-vs-each":
        wanted = [(best, other) for other in order if other != best]
    else:
        wanted = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    found: list[Side] = [(f"{key}[{index}]", _text(item, f"{key}[{index}]")) for index, item in enumerate(items)]
    if mode == "best-vs-worst" and scores[best] == scores[worst]:
        wanted = [(order[0], order[-1])]
    held = [(b, w) for b, w in wanted if scores[b] > scores[w] or ties == "half"]
    if not held:
        raise RowError("tie", f"all {len(items)} responses have the score {scores[0]:g}, no preference", bad=False)
    # Equal texts with unequal scores: of several pairs only those are left out, a lone one is reported as bad.
    kept = [(b, w) for b, w in held if found[b][1] != found[w][1]] or held[:1]
    return [(found[b], found[w], 1.0 if scores[b] > scores[w] else TIED) for b, w in kept]


def _scores(row: Row, key: str, items: list[Any]) -> list[float]:
    """One score per response, higher is better."""
    for name, sign in (("scores", 1.0), ("ratings", 1.0), ("ranks", -1.0)):
        values = row.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(items):
            number = len(values) if isinstance(values, list) else shown(values)
            raise RowError("wrong type", f"'{name}' is of length {number}, expected {len(items)}, one a response")
        return [sign * finite(value, f"{name}[{index}]") for index, value in enumerate(values)]
    scores = []
    for index, item in enumerate(items):
        name_found = _score_key(item) if isinstance(item, dict) else None
        if name_found:
            scores.append(finite(item[name_found], f"{key}[{index}].{name_found}"))
        elif isinstance(item, dict) and item.get("rank") is not None:
            scores.append(-finite(item["rank"], f"{key}[{index}].rank"))
        else:
            raise RowError("missing key", f"no score for '{key}[{index}]': expected 'scores' or a score in it")
    return scores


def _score_key(row: Row) -> str | None:
    return next((key for key in _SCORE_KEYS if row.get(key) is not None), None)


def _text(item: Any, where: str) -> Any:
    if isinstance(item, dict) and "role" not in item:
        for key in _TEXT_KEYS:
            if item.get(key) is not None:
                return item[key]
        raise RowError("missing key", f"'{where}' has no text: expected one of {', '.join(_TEXT_KEYS)}")
    return item


def _winner(row: Row, first: str, second: str) -> int:
    """Negative if the first answer is preferred, positive if the second, 0 for a tie."""
    for key in _SIGNED_KEYS:
        if row.get(key) is not None:
            value = finite(row[key], key)
            return (value > 0) - (value < 0)
    names = [{key, key[-1], f"model_{key[-1]}", f"response_{key[-1]}"} for key in (first, second)]
    for key in _WINNER_KEYS:
        if row.get(key) is None:
            continue
        label = str(row[key]).strip().lower()
        if label in names[0] or label in names[1]:
            return -1 if label in names[0] else 1
        if re.match(r"(tie|draw|equal|both)\b", label.replace("_", " ")):
            return 0
        raise RowError(
            "unknown winner", f"'{key}' is {shown(row[key])}, expected '{first[-1]}', '{second[-1]}' or 'tie'"
        )
    scores = [row.get(f"score_{key[-1]}") for key in (first, second)]
    if None not in scores:
        left, right = (finite(value, f"score_{key[-1]}") for key, value in zip((first, second), scores, strict=True))
        return (left < right) - (left > right)
    raise missing(row, "winner")


def finite(value: Any, where: str) -> float:
    """Return a number as float; `where` names its place in the row.

    Raises:
        RowError: it is no number, or not a finite one.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise RowError("wrong type", f"'{where}' is {shown(value)}, expected a finite number")
    return number


def missing(row: Row, key: str) -> RowError:
    """Return the error for a key that the row should have; it names those that the row has."""
    has = ", ".join(list(row)[:8]) or "nothing"
    return RowError("missing key", f"missing key '{key}' (the row has {has})")


def shown(value: Any) -> str:
    """Return a value of the data as a message shows it: cut to 40 characters, with its type unless it is text."""
    text = repr(value)
    if len(text) > 40:
        text = text[:37] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
