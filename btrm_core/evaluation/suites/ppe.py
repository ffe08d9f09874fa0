"""Preference Proxy Evaluations (PPE): human votes, and sampled answers that can be checked.

Score of human votes: the accuracy over votes that are no tie, for all and for the kinds that a row names; and how far
the order of the models by rewards is that by votes, and how sure (`arena`). Of checkable answers: the mean over prompts
of the accuracy of right against wrong answers (on the pairs that the row names, else on all; equal rewards count half),
the rightness of the answer with the highest reward of k, at the end (k = K) and where it is highest, the mean over k of
the squared distance of that curve from the best possible one, and the area under the ROC curve of right against wrong
over all prompts. The total is the mean of the data sets' accuracies. The curve is the expectation over all draws of k
answers, where PPE takes a mean of random ones.

Rows: prompt, response_1, response_2, model_a, model_b, winner, language, is_code, hard_prompt, easy_prompt, if_prompt,
math_prompt; or prompt, response_1 ... response_K, scores (right or wrong), sampled_conflict_pairs (places from 0).

Reference: Frick et al., How to Evaluate Reward Models for RLHF, arXiv:2410.14872.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.best_of_n import expected_best
from btrm_core.evaluation.suites.arena import order_of_models
from btrm_core.evaluation.suites.base import Item, Rewards, Row, SuiteScores, asked, mean, text, unit_of

NAME = "ppe"
HUMAN = "human preference"
SOURCES = (
    "lmarena-ai/PPE-Human-Preference-V1",
    *(f"lmarena-ai/PPE-{name}-Best-of-K" for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")),
)
_WINNERS = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0), "tie": (0.5, 0.5), "tie (bothbad)": (0.5, 0.5)}
_MODELS = ("model_a", "model_b")
TIED = 0.5
_KINDS = {
    "code": "is_code",
    "hard": "hard_prompt",
    "easy": "easy_prompt",
    "instructions": "if_prompt",
    "math": "math_prompt",
}
_PAIRS = "sampled_conflict_pairs"


def items(row: Row, where: str) -> list[Item]:
    """One vote, or one prompt with K answers; none for answers that are all alike.

    Args:
        row: prompt, response_1, response_2, ... with a winner (a vote) or scores (right or wrong).
        where: the subset of a row with scores.

    Raises:
        DataError: there is neither a winner nor two scores, or a text is missing.
    """
    prompt = asked(row, "prompt")
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
    if odd := [value for value in scores if value not in (True, False)]:
        raise DataError(f"'scores' holds {odd[0]!r}; expected true or false for every answer")
    answers = [text(row, f"response_{number}") for number in range(1, len(scores) + 1)]
    gold_K = tuple(map(float, scores))
    if len(set(gold_K)) < 2:
        return []
    item = Item(name, where, unit_of(where, name, prompt), prompt, answers, gold=gold_K, row=row)
    conflicts(item)
    return [item]


def score(items: Sequence[Item], rewards: Rewards) -> SuiteScores:
    """Accuracy of every data set, the order of models by votes, and best of K where there are K answers.

    Args:
        items: votes and prompts with K answers.
        rewards: one list per item.
    """
    accuracies: dict[str, list[float]] = {}
    curves: dict[str, list[np.ndarray]] = {}
    best: dict[str, list[np.ndarray]] = {}
    answers: dict[str, list[tuple[float, float]]] = {}
    domains: dict[str, list[float]] = {}
    games: list[tuple[str, str, float, float]] = []
    for item, given in zip(items, rewards, strict=True):
        if item.subset == HUMAN:
            games += game(item, given)
            if item.gold[0] == TIED:
                continue
        tie = 0.0 if item.subset == HUMAN else 0.5
        accuracies.setdefault(item.subset, []).append(accuracy_within(given, conflicts(item), tie))
        if item.subset == HUMAN:
            for name in domains_of(item):
                domains.setdefault(name, []).append(accuracies[HUMAN][-1])
            continue
        curves.setdefault(item.subset, []).append(best_of(given, item.gold))
        best.setdefault(item.subset, []).append(best_of(item.gold, item.gold))
        answers.setdefault(item.subset, []).extend(zip(given, item.gold, strict=True))
    subsets = {name: mean(values) for name, values in accuracies.items()}
    sections = {**subsets, **{f"{HUMAN}, {name}": value for name, value in order_of_models(games).items()}}
    for name, found in curves.items():
        shortest = min(len(curve) for curve in found)
        curve = np.mean([one[:shortest] for one in found], axis=0)
        sections[f"{name}, best of K"] = mean([float(one[-1]) for one in found])
        sections[f"{name}, highest best of k"] = float(curve.max())
        ideal = np.mean([one[:shortest] for one in best[name]], axis=0)
        sections[f"{name}, loss of best of k"] = float(((ideal - curve) ** 2).mean())
        sections[f"{name}, area under ROC"] = area_under_roc(answers[name])
    total = mean(list(subsets.values())) if subsets else None
    return SuiteScores(total, sections, {**subsets, **{name: mean(values) for name, values in domains.items()}})


def domains_of(item: Item) -> list[str]:
    """The parts of the human votes that a vote is in, beside all.

    Args:
        item: a vote.
    """
    language = item.row.get("language")
    found = [kind for kind, column in _KINDS.items() if item.row.get(column) is True]
    if language:
        found.append("English" if language == "English" else "other languages")
    return [f"{HUMAN}, {kind}" for kind in found]


def game(item: Item, rewards: Sequence[float]) -> list[tuple[str, str, float, float]]:
    """A vote as `arena` takes it; none where a model has no name or a reward is not finite.

    Args:
        item: a vote.
        rewards: of both answers.
    """
    first, second = (item.row.get(side) for side in _MODELS)
    if not (first and second and all(math.isfinite(r) for r in rewards)):
        return []
    left, right = rewards
    return [(str(first), str(second), item.gold[0], 0.5 * (1 + (left > right) - (left < right)))]


def area_under_roc(answers: Sequence[tuple[float, float]]) -> float:
    """Chance that a right answer to any prompt has a higher reward than a wrong one to any prompt; equal ones half.

    Args:
        answers: reward and rightness each, of both kinds; a reward that is not finite loses.
    """
    from scipy.stats import rankdata

    right = np.array([value > 0 for _, value in answers])
    reward = np.array([given for given, _ in answers])
    # A right answer without a reward stands below all others, a wrong one above: neither can help.
    reward = np.where(np.isfinite(reward), reward, np.where(right, -np.inf, np.inf))
    ranks, number = rankdata(reward), int(right.sum())
    return float((ranks[right].sum() - number * (number + 1) / 2) / (number * (len(right) - number)))


def conflicts(item: Item) -> list[tuple[int, int]]:
    """Places of a right and a wrong answer each: the pairs that the row names, or all.

    Args:
        item: a vote, or a prompt with K answers.

    Raises:
        DataError: a pair that the row names is none of a right and a wrong answer.
    """
    good, bad = ([place for place, value in enumerate(item.gold) if value == kind] for kind in (1, 0))
    if not (named := item.row.get(_PAIRS)):
        return [(first, second) for first in good for second in bad]
    pairs = [tuple(sorted(pair, key=lambda place: place not in good)) for pair in named]
    for pair, given in zip(pairs, named, strict=True):
        if len(pair) != 2 or pair[0] not in good or pair[1] not in bad:
            raise DataError(f"'{_PAIRS}' holds {list(given)}; expected places from 0 of a right and a wrong answer")
    return pairs


def accuracy_within(rewards: Sequence[float], pairs: Sequence[tuple[int, int]], tie: float) -> float:
    """How often a right answer has a higher reward than a wrong one.

    Args:
        rewards: of the answers to one prompt; one that is not finite gives 0.
        pairs: places of a right and a wrong answer each, at least one.
        tie: what equal rewards count.
    """
    if not all(math.isfinite(r) for r in rewards):
        return 0.0
    return mean([1.0 if rewards[g] > rewards[b] else tie * (rewards[g] == rewards[b]) for g, b in pairs])


def best_of(rewards: Sequence[float], gold: Sequence[float]) -> np.ndarray:
    """Expected rightness [K] of the answer with the highest reward of k drawn ones, for k = 1 ... K.

    Args:
        rewards: of the K answers to one prompt; if one is not finite, all is 0.
        gold: what each answer is worth.
    """
    if not all(math.isfinite(r) for r in rewards):
        return np.zeros(len(gold))
    return np.asarray(expected_best(np.array(rewards), np.array(gold), len(gold)))


def results(items: Sequence[Item], rewards: Rewards, model: str) -> Any:
    """The rows with the rewards of their answers, in order.

    Args:
        items: votes and prompts with K answers.
        rewards: one list per item.
        model: not entered; the rows have no place for it.
    """
    return [{**item.row, "rewards": list(given)} for item, given in zip(items, rewards, strict=True)]
