"""What a suite is: where its rows are, what is asked of each, and how rewards become the published score.

A suite is a module with the five names of `Suite`. Others' are found through the entry-point group `btrm.suites`.

Shapes: I items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.statistics import SEED, Interval, percentiles

DRAWS = 300
Row = Mapping[str, Any]
Rewards = Sequence[Sequence[float]]
"""For every item the rewards of its responses; NaN where one could not be scored."""


@dataclass(frozen=True)
class Item:
    """One thing asked of a reward model.

    Attributes:
        id: the row's.
        subset: the part of the suite it belongs to.
        unit: items of equal units are resampled together, and may be scored together.
        prompt: messages (role, content).
        responses: what is to be scored; the right ones first, where `gold` does not say which they are.
        correct: how many of the responses are right.
        gold: what each response is worth, where the suite says more than right and wrong.
        row: the row it was made of.
    """

    id: str
    subset: str
    unit: str
    prompt: Sequence[Mapping[str, str]]
    responses: Sequence[str]
    correct: int = 1
    gold: Sequence[float] = ()
    row: Row = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class SuiteScores:
    """Scores from 0 to 1 (unless the suite says otherwise).

    Attributes:
        total: the suite's one number; None if a part it needs has no items.
        sections: its parts, as they are published.
        subsets: the smallest parts.
    """

    total: float | None
    sections: Mapping[str, float]
    subsets: Mapping[str, float]


@dataclass(frozen=True)
class SuiteResult:
    """What a suite says of a model.

    Attributes:
        suite: its name.
        model: what gave the rewards.
        items: how many things were asked.
        unscored: items of which a response could not be scored; they count as wrong.
        scores: as published.
        intervals: of the total (under "total") and of every section, resampled by unit within each subset.
    """

    suite: str
    model: str
    items: int
    unscored: int
    scores: SuiteScores
    intervals: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Suite(Protocol):
    """What a module must have to be a suite."""

    NAME: str
    """As it is called on the command line."""
    SOURCES: Sequence[str]
    """Where its rows are published: hub ids as after `--data`."""

    def items(self, row: Row, where: str) -> list[Item]:
        """What a row asks; `where` is the short name of the file it is from. Raises DataError if it is no such row.

        Args:
            row: as it is published.
            where: short name of its file; the subset where the row names none.
        """

    def score(self, items: Sequence[Item], rewards: Rewards) -> SuiteScores:
        """The published score.

        Args:
            items: all, or a resample of them.
            rewards: one list per item, in the order of its responses.
        """

    def results(self, items: Sequence[Item], rewards: Rewards, model: str) -> Any:
        """The results as JSON in the suite's own form.

        Args:
            items: all of the suite.
            rewards: one list per item.
            model: the name to enter where the form has one.
        """


def run_suite(suite: Suite, items: Sequence[Item], rewards: Rewards, model: str, *, draws: int = DRAWS) -> SuiteResult:
    """Score a suite, with intervals of its total and sections.

    Args:
        suite: the module.
        items: all that were asked, in any order.
        rewards: one list per item; NaN where a response could not be scored.
        model: its name in the result.
        draws: resamples for the intervals; a section some resample lacks gets none.

    Raises:
        DataError: there are no items.
    """
    if not items:
        raise DataError(f"the rows of suite {suite.NAME} hold no item; expected at least one")
    unscored = sum(not all(math.isfinite(r) for r in given) for given in rewards)
    drawn: dict[str, list[float]] = {}
    for resampled, given in _samples(items, rewards, draws):
        found = suite.score(resampled, given)
        for name, value in {**found.sections, "total": found.total}.items():
            if value is not None and math.isfinite(value):
                drawn.setdefault(name, []).append(value)
    intervals = {name: percentiles(np.array(values)) for name, values in drawn.items() if len(values) == draws}
    return SuiteResult(suite.NAME, model, len(items), unscored, suite.score(items, rewards), intervals)


def _samples(items: Sequence[Item], rewards: Rewards, draws: int) -> Any:
    """Yield items and rewards with whole units drawn with replacement, as many of every subset as it has."""
    strata: dict[str, dict[str, list[int]]] = {}
    for place, item in enumerate(items):
        strata.setdefault(item.subset, {}).setdefault(item.unit, []).append(place)
    generator = np.random.default_rng(SEED)
    if all(len(units) < 2 for units in strata.values()):
        return
    for _ in range(draws):
        chosen: list[Item] = []
        given: list[Sequence[float]] = []
        for units in strata.values():
            names = list(units)
            for copy, which in enumerate(generator.integers(0, len(names), len(names)).tolist()):
                for place in units[names[which]]:
                    chosen.append(replace(items[place], unit=f"{names[which]}#{copy}"))
                    given.append(rewards[place])
        yield chosen, given


def right(item: Item, rewards: Sequence[float]) -> bool:
    """Whether every right response has a higher reward than every wrong one; a tie is wrong.

    Args:
        item: `correct` says how many of its first responses are right.
        rewards: of its responses; one that is not finite makes the item wrong.
    """
    if not all(math.isfinite(r) for r in rewards):
        return False
    return min(rewards[: item.correct]) > max(rewards[item.correct :])


def shares(items: Sequence[Item], rewards: Rewards) -> dict[str, float]:
    """Share of right items per subset, in the order of their first items.

    Args:
        items: at least one response right and one wrong each.
        rewards: one list per item.
    """
    won: dict[str, list[bool]] = {}
    for item, given in zip(items, rewards, strict=True):
        won.setdefault(item.subset, []).append(right(item, given))
    return {name: sum(values) / len(values) for name, values in won.items()}


def mean(values: Sequence[float]) -> float:
    """The mean of at least one number.

    Args:
        values: must not be empty.
    """
    return sum(values) / len(values)


def text(row: Row, name: str) -> str:
    """A text that a row must have.

    Args:
        row: as it is published.
        name: its field.

    Raises:
        DataError: it has none.
    """
    value = row.get(name)
    if not isinstance(value, str):
        has = ", ".join(list(row)[:8]) or "nothing"
        raise DataError(f"'{name}' is {type(value).__name__}, expected text; the row has {has}")
    return value


def texts(row: Row, name: str) -> list[str]:
    """A list of texts that a row must have.

    Args:
        row: as it is published.
        name: its field; an empty list counts as none.

    Raises:
        DataError: it has none.
    """
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise DataError(f"'{name}' is {type(value).__name__}, expected a list of texts")
    return value


def asked(row: Row, name: str) -> list[dict[str, str]]:
    """The messages of a prompt that a row must have; a text is the user's one message.

    Args:
        row: as it is published.
        name: its field.

    Raises:
        DataError: it is neither text nor messages.
    """
    value = row.get(name)
    if not isinstance(value, list):
        return [{"role": "user", "content": text(row, name)}]
    for message in value or [None]:
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
            raise DataError(f"'{name}' holds {str(message)[:40]!r}, expected text or messages with role and content")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def unit_of(subset: str, name: str, prompt: Sequence[Mapping[str, str]]) -> str:
    """What items of one row have in common: its id, or its prompt where it has none.

    Args:
        subset: equal ids in two subsets are different rows.
        name: the row's id, "" if it has none.
        prompt: messages; the last one's content stands for all.
    """
    return f"{subset}:{name or prompt[-1]['content']}"


def is_standard(row: Row) -> bool:
    """Whether a row is in btrm's standard form: chosen and rejected as lists of messages.

    Args:
        row: as it is published.
    """
    return all(isinstance(row.get(side), list) and row[side] and isinstance(row[side][0], dict) for side in _SIDES)


_SIDES = ("chosen", "rejected")


def standard(row: Row, subset: str) -> Item:
    """The item of a row in the standard form.

    Args:
        row: one that `is_standard` accepts; both sides begin with the prompt and end with the answer.
        subset: where the item belongs.
    """
    *prompt, chosen = row["chosen"]
    name = str(row.get("id", ""))
    responses = (chosen["content"], row["rejected"][-1]["content"])
    return Item(name, subset, unit_of(subset, name, prompt), prompt, responses, row=row)
