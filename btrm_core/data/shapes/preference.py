"""Which answer of a row is preferred, and by how much.

Scored responses, ranks, rows that name a winner and rows of a chosen and a rejected answer become comparisons here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from btrm_core.data.formats import Shape, Side, Ties, WhichPairs
from btrm_core.data.shapes import keys
from btrm_core.data.shapes.values import RowError, as_number, finite, listed, shown
from btrm_core.data.shapes.view import RowView

TIED = 0.5

_WINNER_KEYS = ("winner", "better_response_id", "preference", "choice", "preferred")
_OTHER_WINNER_KEYS = (
    *("label", "better", "better_response", "preferred_response", "overall_winner", "human_preference"),
    *("orig_preference", "verdict"),
)
"""Asked only where the answers have no scores: a `label` may also be something else."""
_SIGNED_KEYS = ("overall_preference", "preference_strength")
_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


@dataclass(frozen=True)
class Compared:
    """A preferred and another answer.

    Attributes:
        chosen: the preferred one.
        rejected: the other.
        probability: how sure it is that chosen is the better one.
        gap: by how much their scores differ; None where the row gives no scores.
    """

    chosen: Side
    rejected: Side
    probability: float = 1.0
    gap: float | None = None


def compared(shape: Shape, view: RowView, which: WhichPairs, ties: Ties = "skip") -> list[Compared]:
    """Return which answers are preferred to which; at least one pair of them.

    Args:
        shape: the answers that were found in the row.
        view: the row, asked for winner, scores and probability.
        which: the pairs that scored answers give; see `convert`.
        ties: "half" makes comparisons of ties, with probability 0.5; "skip" refuses them.

    Returns:
        The comparisons; of scored answers the best first.

    Raises:
        RowError: the row names no winner, or is a tie and ties do not count half; it has one answer alone, or a score,
            `probability` or `choice` that cannot be read.
    """
    sides = shape.sides
    if shape.kind == "single":
        if shape.key == "response":
            raise RowError("only one response", "'response' is one answer, nothing to compare", bad=False)
        raise view.missing("chosen")
    if shape.kind == "scored":
        return _scored(shape, view, which, ties)
    sure = _probability(view)
    if shape.kind == "pair":
        return [Compared(sides[0], sides[1], sure, _gap(view, _PAIR_SCORES))]
    if shape.kind == "ranks":
        both = [Compared(b, w, sure) for b in sides[: shape.better] for w in sides[shape.better :]]
        return [one for one in both if one.chosen.value != one.rejected.value] or both[:1]
    if shape.kind == "choice":
        best = _chosen_place(view, len(sides))
        return [Compared(sides[best], side, sure) for place, side in enumerate(sides) if place != best]
    first, second = (side.where for side in sides)
    winner = _winner(view, first, second)
    if winner == 0 and ties == "skip":
        raise RowError("tie", f"'{first}' and '{second}' are tied, no preference", bad=False)
    better, worse = sides if winner <= 0 else sides[::-1]
    gap = _gap(view, _side_scores(first, second))
    return [Compared(better, worse, TIED if winner == 0 else sure, gap if gap is None or winner <= 0 else -gap)]


def _gap(view: RowView, names: Sequence[Sequence[str]]) -> float | None:
    """How much larger the first of two score columns is, if the margin is asked to come from scores."""
    if not view.naming.margin_of_scores:
        return None
    for first, second in names:
        left, right = as_number(view.get(first)), as_number(view.get(second))
        if left is not None and right is not None:
            return left - right
    signed = next((as_number(view.get(key)) for key in _SIGNED_KEYS if view.has(key)), None)
    return None if signed is None else abs(signed)


def _chosen_place(view: RowView, number: int) -> int:
    value = as_number(view.get("choice"))
    if value is None or value not in range(number):
        raise RowError("unknown winner", f"'choice' is {shown(view.get('choice'))}, expected 0 to {number - 1}")
    return int(value)


def _probability(view: RowView) -> float:
    """How sure it is that the chosen answer is the better one; 1 unless the row says less."""
    if not view.has("probability"):
        return 1.0
    value = finite(view["probability"], "probability")
    if not TIED <= value <= 1:
        hint = "; swap chosen and rejected" if 0 <= value < TIED else ""
        raise RowError(
            "wrong type", f"'probability' is {value:g}, expected 0.5 (a tie) to 1 that chosen is better{hint}"
        )
    return value


def _scored(shape: Shape, view: RowView, mode: WhichPairs, ties: Ties) -> list[Compared]:
    key, items, found = shape.key, shape.items, shape.sides
    if len(items) == 1:
        raise RowError("only one response", f"'{key}' holds one response, nothing to compare", bad=False)
    given, are_ranks = _scores(view, key, items)
    if any(side.value is None for side in found):
        view.remark("responses without a text, left out")
        given = [None if side.value is None else score for side, score in zip(found, given, strict=True)]
    scores = {index: score for index, score in enumerate(given) if score is not None}
    if len(scores) < len(items):
        view.remark("responses without a score, left out")
    if len(scores) < 2:
        reason = f"{'only one' if scores else 'none'} of the {len(items)} responses has a score, nothing to compare"
        raise RowError("only one response", reason, bad=False)
    order = sorted(scores, key=lambda index: -scores[index])  # stable: first of equals first
    best, worst = order[0], min(scores, key=lambda index: scores[index])
    if mode == "best-vs-worst":
        wanted = [(best, worst if scores[best] > scores[worst] else order[-1])]
    elif mode == "random":
        unequal = [(b, w) for b in order for w in order if scores[b] > scores[w]]
        wanted = [_drawn(unequal, found)] if unequal else [(best, order[-1])]
    elif mode == "best-vs-each":
        wanted = [(best, other) for other in order if other != best]
    else:
        wanted = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    held = [(b, w) for b, w in wanted if scores[b] > scores[w] or ties == "half"]
    if not held:
        text = f"all {len(scores)} responses have the score {scores[best]:g}, no preference"
        raise RowError("tie", text, bad=False)
    # Equal texts with unequal scores: of several pairs only those are left out, a lone one is reported as bad.
    kept = [(b, w) for b, w in held if found[b].value != found[w].value] or held[:1]
    has_gap = view.naming.margin_of_scores or not are_ranks  # a distance of ranks is none of quality unless one says so
    gap: Callable[[int, int], float | None] = lambda b, w: scores[b] - scores[w] if has_gap else None  # noqa: E731
    return [Compared(found[b], found[w], 1.0 if scores[b] > scores[w] else TIED, gap(b, w)) for b, w in kept]


def _drawn(pairs: Sequence[tuple[int, int]], sides: Sequence[Side]) -> tuple[int, int]:
    """One of several pairs, by a hash of the answers: the same in every run, file and order of rows."""
    texts = "\0".join(repr(side.value) for side in sides)
    return pairs[int.from_bytes(hashlib.sha256(texts.encode("utf-8", "replace")).digest()[:8], "big") % len(pairs)]


def _scores(view: RowView, key: str, items: Sequence[Any]) -> tuple[list[float | None], bool]:
    """One score per response, higher is better, None for a response that has none; and whether they are ranks."""
    for name, sign in (("scores", 1.0), ("ratings", 1.0), ("rewards", 1.0), ("ranks", -1.0)):
        values = listed(view.get(name))
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(items):
            number = len(values) if isinstance(values, list) else shown(values)
            raise RowError("wrong type", f"'{name}' is of length {number}, expected {len(items)}, one a response")
        return _numbers(values, sign, name), sign < 0
    for inner, sign in (*((name, 1.0) for name in keys.SCORES), ("rank", -1.0)):
        values = [item.get(inner) if isinstance(item, dict) else None for item in items]
        if any(as_number(value) is not None for value in values):
            return _numbers(values, sign, f"{key}[].{inner}"), sign < 0
    raise RowError("missing key", f"no score for '{key}[0]': expected 'scores' or a score in it")


def _numbers(values: Sequence[Any], sign: float, where: str) -> list[float | None]:
    found = [None if (number := as_number(_flag(value))) is None else sign * number for value in values]
    if all(number is None for number in found):
        raise RowError("missing key", f"no response has a score: '{where}' is {shown(list(values))}")
    return found


def _winner(view: RowView, first: str, second: str) -> int:
    """Negative if the first answer is preferred, positive if the second, 0 for a tie."""
    for key in _SIGNED_KEYS:
        if view.has(key):
            value = finite(view[key], key)
            return (value > 0) - (value < 0)
    ends = [key[-1].lower() for key in (first, second)]
    if view.has(f"winner_model_{ends[0]}") and view.has(f"winner_model_{ends[1]}"):
        left, right, tie = (as_number(_flag(view.get(f"winner_{name}"))) for name in (*_models(ends), "tie"))
        return 0 if tie else int(bool(right)) - int(bool(left))
    if first == "human_ref_A" and view.has("labels"):
        if (label := as_number(view["labels"])) not in (0, 1):
            raise RowError("unknown winner", f"'labels' is {shown(view['labels'])}, expected 1 (A is preferred) or 0")
        return -1 if label else 1
    scores = next((names for names in _side_scores(first, second) if all(map(view.has, names))), None)
    named = next(filter(view.has, _WINNER_KEYS if scores else (*_WINNER_KEYS, *_OTHER_WINNER_KEYS)), None)
    if named is not None:
        return _named(view[named], named, _names_of(view, (first, second)), (first, second))
    if scores is None:
        raise view.missing("winner")
    left, right = (finite(view[name], name) for name in scores)
    return (left < right) - (left > right)


def _side_scores(first: str, second: str) -> list[tuple[str, str]]:
    """Where the scores of two answers may stand, by the ends of their names or by the whole."""
    forms: tuple[Callable[[str], str], ...] = (
        *(lambda key: f"score_{key[-1]}", lambda key: f"rating_{key[-1]}", lambda key: f"reward_{key[-1]}"),
        *(lambda key: f"{key}_score", lambda key: f"{key}_rating", lambda key: f"{key}_reward"),
    )
    return [(form(first), form(second)) for form in forms]


def _names_of(view: RowView, keys_of: tuple[str, str]) -> list[set[str]]:
    """What the winner may be called where the first answer wins, and where the second does."""
    names = []
    for key, words in zip(keys_of, (("first", "left"), ("second", "right")), strict=True):
        end = key[-1].lower()
        names.append({key.lower(), end, *words, *(f"{what}_{end}" for what in ("model", "response", "assistant"))})
    models = [view.peek(f"model_{key[-1]}") or view.peek(f"{key}_model") for key in keys_of]
    if all(isinstance(model, str) for model in models) and models[0] != models[1]:
        for known, model in zip(names, models, strict=True):
            known.add(_label(model))
    return names


def _label(value: Any) -> str:
    return re.sub(r"[\[\]\s]+", " ", str(value)).strip().lower().replace(" ", "_")


def _models(ends: Sequence[str]) -> tuple[str, str]:
    return f"model_{ends[0]}", f"model_{ends[1]}"


def _flag(value: Any) -> Any:
    """A truth value as a number: 1, true and "True" say the same in different files."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    return int(value) if isinstance(value, bool) else value


def _named(value: Any, key: str, names: Sequence[set[str]], keys: tuple[str, str]) -> int:
    number = as_number(value)
    if number is not None and number.is_integer():
        value = int(number)  # 1.0 where a column holds a missing value elsewhere
    label = _label(value)
    text = label.replace("_", " ")
    if label in names[0] or label in names[1]:
        return -1 if label in names[0] else 1
    if match := re.fullmatch(r"([a-z0-9])\s*(>+|=|<+)\s*([a-z0-9])", text):
        ends = [first[-1].lower() for first in keys]
        if {match[1], match[3]} == set(ends):
            first_wins = (match[2][0] == ">") == (match[1] == ends[0])
            return 0 if match[2] == "=" else -1 if first_wins else 1
    if re.match(r"(tie|tied|draw|equal|both|neither|none|same|no preference)\b", text):
        return 0
    raise RowError("unknown winner", f"'{key}' is {shown(value)}, expected '{keys[0][-1]}', '{keys[1][-1]}' or 'tie'")
