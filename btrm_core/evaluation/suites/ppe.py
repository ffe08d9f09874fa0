"""Preference Proxy Evaluations (PPE): human votes, and sampled answers that can be checked.

Score of human votes: the accuracy over votes that are no tie, for all and for those on code and in English; and how far
the order of the models by rewards is that by votes (Spearman and Kendall, of strengths that fit the votes best in the
Bradley-Terry model, a tie being half a win for each). Of checkable answers: the mean over prompts of the accuracy of
right against wrong answers (equal rewards count half), the rightness of the answer with the highest reward of k, at the
end (k = K) and where it is highest, and the area under the ROC curve of right against wrong over all prompts. The total
is the mean of the data sets' accuracies. PPE publishes further figures (the correlation of win rates row by row,
separability and agreement of its intervals, the Brier score of ranks, the distance from the best curve), which are not
computed here.

Rows: prompt, response_1, response_2, model_a, model_b, winner, language, is_code; or prompt, response_1 ... response_K,
scores (right or wrong).

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
_WINNERS = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0), "tie": (0.5, 0.5), "tie (bothbad)": (0.5, 0.5)}
_MODELS = ("model_a", "model_b")
TIED = 0.5
_ROUNDS = 100
_PRIOR = 1e-3
"""Wins each way that two models are given who met, so that one who always wins has a finite strength."""


def items(row: Row, where: str) -> list[Item]:
    """One vote, or one prompt with K answers; none for answers that are all alike.

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
    """Accuracy of every data set, the order of models by votes, and best of K where there are K answers.

    Args:
        items: votes and prompts with K answers.
        rewards: one list per item.
    """
    accuracies: dict[str, list[float]] = {}
    curves: dict[str, list[np.ndarray]] = {}
    answers: dict[str, list[tuple[float, float]]] = {}
    domains: dict[str, list[float]] = {}
    votes: list[tuple[Item, Sequence[float]]] = []
    for item, given in zip(items, rewards, strict=True):
        if item.subset == HUMAN:
            votes.append((item, given))
            if item.gold[0] == TIED:
                continue
        accuracies.setdefault(item.subset, []).append(accuracy_within(given, item.gold))
        if item.subset == HUMAN:
            for name in domains_of(item):
                domains.setdefault(name, []).append(accuracies[HUMAN][-1])
            continue
        curves.setdefault(item.subset, []).append(best_of(given, item.gold))
        answers.setdefault(item.subset, []).extend(zip(given, item.gold, strict=True))
    subsets = {name: mean(values) for name, values in accuracies.items()}
    sections = {**subsets, **order_of_models(votes)}
    for name, found in curves.items():
        shortest = min(len(curve) for curve in found)
        curve = np.mean([one[:shortest] for one in found], axis=0)
        sections[f"{name}, best of K"] = mean([float(one[-1]) for one in found])
        sections[f"{name}, highest best of k"] = float(curve.max())
        sections[f"{name}, area under ROC"] = area_under_roc(answers[name])
    total = mean(list(subsets.values())) if subsets else None
    return SuiteScores(total, sections, {**subsets, **{name: mean(values) for name, values in domains.items()}})


def domains_of(item: Item) -> list[str]:
    """The parts of the human votes that a vote is in, beside all.

    Args:
        item: a vote.
    """
    found = [f"{HUMAN}, code"] if item.row.get("is_code") is True else []
    return found + ([f"{HUMAN}, English"] if item.row.get("language") == "English" else [])


def order_of_models(votes: Sequence[tuple[Item, Sequence[float]]]) -> dict[str, float]:
    """How far the order of the models by rewards is that by votes; nothing for fewer than three models.

    Args:
        votes: each with the rewards of both answers; those without two finite rewards are left out.
    """
    from scipy.stats import kendalltau, spearmanr

    known = [(item, given) for item, given in votes if all(math.isfinite(r) for r in given)]
    names = sorted({str(item.row.get(side)) for item, _ in known for side in _MODELS if item.row.get(side)})
    if len(names) < 3:
        return {}
    place = {name: number for number, name in enumerate(names)}
    wins_2MM = np.zeros((2, len(names), len(names)))
    for item, (left, right) in known:
        if not all(item.row.get(side) for side in _MODELS):
            continue
        a, b = (place[str(item.row[side])] for side in _MODELS)
        for wins_MM, first in zip(wins_2MM, (item.gold[0], 0.5 * (1 + (left > right) - (left < right))), strict=True):
            wins_MM[a, b] += first
            wins_MM[b, a] += 1 - first
    by_votes, by_rewards = (strengths(wins_MM) for wins_MM in wins_2MM)
    if np.ptp(by_votes) == 0 or np.ptp(by_rewards) == 0:
        return {}
    return {
        f"{HUMAN}, Spearman of models": float(spearmanr(by_votes, by_rewards).statistic),
        f"{HUMAN}, Kendall of models": float(kendalltau(by_votes, by_rewards).statistic),
    }


def strengths(wins_MM: np.ndarray) -> np.ndarray:
    """Bradley-Terry strengths (logarithms, of mean 0) that make the wins likeliest.

    Args:
        wins_MM: how often the model of a row has won against that of a column; a tie is half a win for each.

    Reference:
        Bradley and Terry 1952, Rank analysis of incomplete block designs.
    """
    wins_MM = wins_MM + _PRIOR * (wins_MM + wins_MM.T > 0)
    met_MM = wins_MM + wins_MM.T
    strength_M = np.zeros(len(wins_MM))
    for _ in range(_ROUNDS):  # Newton's method with steps of bounded length: the likelihood has one maximum
        chance_MM = 1 / (1 + np.exp(strength_M[None, :] - strength_M[:, None]))
        gradient_M = (wins_MM - met_MM * chance_MM).sum(axis=1)
        weight_MM = met_MM * chance_MM * (1 - chance_MM)
        hessian_MM = np.diag(weight_MM.sum(axis=1)) - weight_MM
        step_M = np.linalg.lstsq(hessian_MM, gradient_M, rcond=None)[0]
        strength_M = strength_M + step_M * min(1.0, 1.0 / max(1e-12, float(np.abs(step_M).max())))
        strength_M = strength_M - strength_M.mean()
        if np.abs(step_M).max() < 1e-9:
            break
    out: np.ndarray = strength_M.round(6)
    return out


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


def best_of(rewards: Sequence[float], gold: Sequence[float]) -> np.ndarray:
    """Expected rightness of the answer with the highest reward of k drawn ones, for k = 1 ... K; 0 if one has none.

    Args:
        rewards: of the answers to one prompt; one that is not finite gives 0.
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
