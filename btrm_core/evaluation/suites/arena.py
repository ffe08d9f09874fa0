"""How far rewards order chat models as votes do, and how sure they are of it: PPE's figures of models.

Every vote is a game between two models, won once as people voted and once as the rewards say; a tie is half a win for
each. Strengths are those of the Bradley-Terry model, and votes are drawn with replacement for their intervals.

Shapes: M models, U pairs of models that met, B draws.

Reference:
    Frick et al., How to Evaluate Reward Models for RLHF, arXiv:2410.14872, whose code was not at hand; separability,
    agreement and Brier score as others quote section 3 of Li et al., arXiv:2406.11939. No published value was compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from btrm_core.evaluation.statistics import LEVEL, SEED, correlation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

DRAWS = 100
"""Samples of the votes for the intervals of strengths, as many as in the reference."""
_ROUNDS = 100
_PRIOR = 1e-3
"""Wins each way that two models are given who met, so that one who always wins has a finite strength."""
_OUTCOMES = np.array([0.0, 0.5, 1.0])


def order_of_models(games: Sequence[tuple[str, str, float, float]]) -> dict[str, float]:
    """What the rewards say of the models beside what the votes say; nothing for fewer than three models.

    Spearman and Kendall compare the strengths. The row-wise Pearson correlation is that of a model's win rates against
    the others, averaged over models. Separability is the share of pairs of models whose intervals of strengths by
    rewards are disjoint. Agreement gives a pair 1 where both votes and rewards separate it in the same order, -1 in
    opposite orders and 0 where one does not. The Brier score is the mean square of how far the share of draws in which
    one model is the stronger by rewards is from the order by votes (1, 0, or a half).

    Args:
        games: the models, and what the first one won by votes and by rewards: 0, a half or 1.
    """
    from scipy.stats import kendalltau, spearmanr

    games = [game for game in games if game[0] != game[1]]
    names = sorted({name for a, b, *_ in games for name in (a, b)})
    if len(names) < 3:
        return {}
    pairs_U2, counts_U33 = _met(games, names)
    wins_2MM = _wins(counts_U33[None], pairs_U2, len(names))[:, 0]
    by_votes, by_rewards = strengths(wins_2MM)
    if np.ptp(by_votes) == 0 or np.ptp(by_rewards) == 0:
        return {}
    found = {
        "Spearman of models": float(spearmanr(by_votes, by_rewards).statistic),
        "Kendall of models": float(kendalltau(by_votes, by_rewards).statistic),
    }
    if (rows := row_wise_pearson(wins_2MM)) is not None:
        found["row-wise Pearson of models"] = rows
    total = int(counts_U33.sum())
    chances = counts_U33.ravel() / total
    drawn = np.random.default_rng(SEED).multinomial(total, chances, size=DRAWS).astype(np.float64)
    drawn_2BM = strengths(_wins(drawn.reshape(DRAWS, *counts_U33.shape), pairs_U2, len(names)))
    return found | sureness(by_votes, drawn_2BM)


def _met(games: Sequence[tuple[str, str, float, float]], names: list[str]) -> tuple[NDArray[np.int64], FloatArray]:
    """Pairs of models in the order of their names, and how often each ended so by votes (rows) and by rewards."""
    place = {name: number for number, name in enumerate(names)}
    counts: dict[tuple[int, int], FloatArray] = {}
    for a, b, vote, reward in games:
        first, second = place[a], place[b]
        if first > second:
            first, second, vote, reward = second, first, 1 - vote, 1 - reward
        counts.setdefault((first, second), np.zeros((3, 3)))[int(2 * vote), int(2 * reward)] += 1
    return np.array(list(counts)), np.array(list(counts.values()))


def _wins(counts_BU33: FloatArray, pairs_U2: NDArray[np.int64], models: int) -> FloatArray:
    """How often the model of a row has won against that of a column: by votes, then by rewards [2, B, M, M]."""
    out = np.zeros((2, len(counts_BU33), models, models))
    first, second = pairs_U2.T
    total_BU = counts_BU33.sum(axis=(2, 3))
    for wins_BMM, axis in zip(out, (3, 2), strict=True):
        won_BU = counts_BU33.sum(axis=axis) @ _OUTCOMES
        wins_BMM[:, first, second] = won_BU
        wins_BMM[:, second, first] = total_BU - won_BU
    return out


def strengths(wins_MM: FloatArray) -> FloatArray:
    """Bradley-Terry strengths [..., M] (natural logarithms, of mean 0) that make the wins likeliest.

    Args:
        wins_MM: how often the model of a row has won against that of a column [..., M, M]; a tie is half a win for
            each. Leading axes are separate sets of games.

    Reference:
        Bradley and Terry 1952, Rank analysis of incomplete block designs.
    """
    wins_MM = wins_MM + _PRIOR * (wins_MM + np.swapaxes(wins_MM, -1, -2) > 0)
    met_MM = wins_MM + np.swapaxes(wins_MM, -1, -2)
    strength_M = np.zeros(wins_MM.shape[:-1])
    models = np.arange(wins_MM.shape[-1])
    for _ in range(_ROUNDS):  # Newton's method with steps of bounded length: the likelihood has one maximum
        chance_MM = 1 / (1 + np.exp(strength_M[..., None, :] - strength_M[..., :, None]))
        gradient_M = (wins_MM - met_MM * chance_MM).sum(axis=-1)
        curvature_MM = -met_MM * chance_MM * (1 - chance_MM)
        # Only differences of strengths matter: the smallest of curvatures makes the common level count too.
        curvature_MM[..., models, models] += 1e-9 - curvature_MM.sum(axis=-1)
        step_M = np.linalg.solve(curvature_MM, gradient_M[..., None])[..., 0]
        step_M = step_M - step_M.mean(axis=-1, keepdims=True)
        longest = np.abs(step_M).max(axis=-1, keepdims=True)
        strength_M = strength_M + step_M * np.minimum(1.0, 1.0 / np.maximum(1e-12, longest))
        if longest.max() < 1e-9:
            break
    out: FloatArray = strength_M.round(6)
    return out


def row_wise_pearson(wins_2MM: FloatArray) -> float | None:
    """Mean over models of the correlation between their win rates by votes and by rewards; None if none has any.

    Args:
        wins_2MM: wins of rows against columns, by votes and by rewards.
    """
    met_MM = wins_2MM[0] + wins_2MM[0].T
    found = []
    for model, met_M in enumerate(met_MM):
        others = np.flatnonzero(met_M)
        rates_2M = wins_2MM[:, model, others] / met_M[others]
        if (value := correlation(*rates_2M)) is not None:
            found.append(value)
    return sum(found) / len(found) if found else None


def sureness(by_votes: FloatArray, drawn_2BM: FloatArray) -> dict[str, float]:
    """Separability, agreement and Brier score over all pairs of models.

    Args:
        by_votes: strengths [M] by all votes.
        drawn_2BM: strengths by votes and by rewards in draws of the votes.
    """
    tail = (1 - LEVEL) / 2
    low_2M, high_2M = np.quantile(drawn_2BM, (tail, 1 - tail), axis=1)
    i, j = np.triu_indices(len(by_votes), 1)
    order_2U = (low_2M[:, i] > high_2M[:, j]).astype(int) - (low_2M[:, j] > high_2M[:, i])
    gap_BU = drawn_2BM[1][:, i] - drawn_2BM[1][:, j]
    likely_U = ((gap_BU > 0) + 0.5 * (gap_BU == 0)).mean(axis=0)
    true_U = 0.5 * (1 + np.sign(by_votes[i] - by_votes[j]))
    return {
        "separability of models": float((order_2U[1] != 0).mean()),
        "agreement of intervals of models": float((order_2U[0] * order_2U[1]).mean()),
        "Brier score of pairs of models": float(((likely_U - true_U) ** 2).mean()),
    }
