"""Preference Proxy Evaluations (PPE): human votes, and sampled answers that can be checked.

Score: of human votes, the accuracy over votes that are no tie. Of checkable answers, the mean over prompts of the
accuracy of right against wrong answers (equal rewards count half), and of the rightness of the answer with the highest
reward. The total is the mean of the data sets' accuracies. PPE publishes more figures than these two; those are not
computed here.

Rows: prompt, response_1, response_2, winner, language; or prompt, response_1 ... response_K, scores (right or wrong).

Reference: Frick et al., How to Evaluate Reward Models for RLHF, arXiv:2410.14872.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.best_of_n import expected_best
from btrm_core.evaluation.suites.base import Item, Rewards, Row, SuiteScores, mean, question, text, unit_of

NAME = "ppe"
HUMAN = "human preference"
SOURCES = (
    "lmarena-ai/PPE-Human-Preference-V1",
    *(f"lmarena-ai/PPE-{name}-Best-of-K" for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")),
)
_WINNERS = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}


def items(row: Row, where: str) -> list[Item]:
    """One vote, or one prompt with K answers; none for a vote that is a tie, or answers that are all alike.

    Args:
        row: prompt, response_1, response_2, ... with a winner (a vote) or scores (right or wrong).
        where: the subset of a row with scores.

    Raises:
        DataError: there is neither a winner nor two scores, or a text is missing.
    """
    prompt = question(text(row, "prompt"))
    name = str(row.get("question_id", row.get("id", "")))
    if "winner" in row:
        gold = _WINNERS.get(text(row, "winner"))
        if gold is None:
            return []
        responses = (text(row, "response_1"), text(row, "response_2"))
        return [Item(name, HUMAN, unit_of(HUMAN, name, prompt), prompt, responses, gold=gold, row=row)]
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) < 2:
        raise DataError("the row has neither 'winner' nor a list of 'scores'; expected a vote, or answers with scores")
    answers = [text(row, f"response_{number}") for number in range(1, len(scores) + 1)]
    if len({bool(value) for value in scores}) < 2:
        return []
    gold_K = tuple(float(bool(value)) for value in scores)
    return [Item(name, where, unit_of(where, name, prompt), prompt, answers, gold=gold_K, row=row)]


def score(items: Sequence[Item], rewards: Rewards) -> SuiteScores:
    """Accuracy of every data set, and best of K where there are K answers.

    Args:
        items: votes and prompts with K answers.
        rewards: one list per item.
    """
    accuracies: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    for item, given in zip(items, rewards, strict=True):
        accuracies.setdefault(item.subset, []).append(accuracy_within(given, item.gold))
        if item.subset != HUMAN:
            best.setdefault(item.subset, []).append(best_of(given, item.gold))
    subsets = {name: mean(values) for name, values in accuracies.items()}
    kept = {f"{name}, best of K": mean(values) for name, values in best.items()}
    return SuiteScores(mean(list(subsets.values())), {**subsets, **kept}, subsets)


def accuracy_within(rewards: Sequence[float], gold: Sequence[float]) -> float:
    """How often a right answer has a higher reward than a wrong one; ties count half in lists, not in votes.

    Args:
        rewards: of the answers to one prompt; one that is not finite gives 0.
        gold: 1 for a right answer, 0 for a wrong one; there must be both.
    """
    if not all(math.isfinite(r) for r in rewards):
        return 0.0
    good = [r for r, value in zip(rewards, gold, strict=True) if value]
    bad = [r for r, value in zip(rewards, gold, strict=True) if not value]
    half = 0.0 if len(rewards) == 2 else 0.5
    return mean([1.0 if g > b else half * (g == b) for g in good for b in bad])


def best_of(rewards: Sequence[float], gold: Sequence[float]) -> float:
    """Rightness of the answer with the highest reward; the mean of those that share it.

    Args:
        rewards: of the answers to one prompt; one that is not finite gives 0.
        gold: what each answer is worth.
    """
    if not all(math.isfinite(r) for r in rewards):
        return 0.0
    return float(expected_best(np.array(rewards), np.array(gold), len(gold))[-1])


def results(items: Sequence[Item], rewards: Rewards, model: str) -> Any:
    """The rows with the rewards of their answers, in order.

    Args:
        items: votes and prompts with K answers.
        rewards: one list per item.
        model: not entered; the rows have no place for it.
    """
    return [{**item.row, "rewards": list(given)} for item, given in zip(items, rewards, strict=True)]
