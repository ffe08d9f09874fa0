"""Does a reward model prefer the longer answer for its length?

Decides: an answer is longer if it has more than 10 % more tokens (or characters) than the other, by the longer one.
The baseline "longer wins" has two names, because tokens and characters give different numbers.

Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from btrm_core.evaluation.statistics import Accuracy, accuracy, correlation, wins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

SIMILAR = 0.1
"""Lengths that differ by no more than this share of the longer one are similar."""
_STEPS = 50


@dataclass(frozen=True)
class LengthBias:
    """What the lengths of the answers say, and what the rewards make of them.

    Attributes:
        unit: "tokens" or "characters".
        longer_wins: accuracy of always preferring the longer answer; equal lengths count half.
        chosen_longer: accuracy where the chosen answer is longer by more than 10 %; None where there is no such pair.
        similar: accuracy where the lengths are similar.
        chosen_shorter: accuracy where the chosen answer is shorter by more than 10 %.
        controlled: mean of the accuracies where chosen is longer and where it is shorter: what is left of the accuracy
            when length says nothing.
        correlation: Pearson's, of reward differences and length differences between two answers in either order.
        rank_correlation: Spearman's, likewise.
        reward_coefficient: of the reward margin in logit P(chosen) = a * margin + b * length difference, both in
            standard deviations; None where it cannot be estimated.
        length_coefficient: b: above 0, the data prefers longer answers more than these rewards do; below 0, the
            rewards overrate length.
    """

    unit: str
    longer_wins: float
    chosen_longer: Accuracy | None
    similar: Accuracy | None
    chosen_shorter: Accuracy | None
    controlled: float | None
    correlation: float | None
    rank_correlation: float | None
    reward_coefficient: float | None
    length_coefficient: float | None


def longer_wins(chosen_P: IntArray, rejected_P: IntArray) -> float:
    """Accuracy of always preferring the longer answer; equal lengths count half.

    Args:
        chosen_P: lengths of the chosen answers [P], in any unit.
        rejected_P: lengths of the rejected ones [P], in the same.
    """
    return float(wins((chosen_P - rejected_P).astype(np.float64)).mean())


def length_buckets(chosen_P: IntArray, rejected_P: IntArray) -> IntArray:
    """1 where the chosen answer is longer by more than 10 %, -1 where it is shorter by more, else 0; int64 [P].

    Args:
        chosen_P: lengths of the chosen answers [P].
        rejected_P: lengths of the rejected ones [P]; the 10 % are of the longer of both.
    """
    difference_P = chosen_P - rejected_P
    is_similar_P = np.abs(difference_P) <= SIMILAR * np.maximum(chosen_P, rejected_P)
    bucket_P: IntArray = np.where(is_similar_P, 0, np.sign(difference_P)).astype(np.int64)
    return bucket_P


def length_bias(
    margin_P: FloatArray, chosen_P: IntArray, rejected_P: IntArray, prompt_P: IntArray, unit: str
) -> LengthBias:
    """Length bias of reward margins.

    Args:
        margin_P: finite reward margins, at least one.
        chosen_P: lengths of the chosen answers.
        rejected_P: lengths of the rejected answers.
        prompt_P: one number per pair, equal for equal prompts.
        unit: what the lengths count, for the reader.
    """
    bucket_P = length_buckets(chosen_P, rejected_P)

    def among(which: int) -> Accuracy | None:
        is_in_P = bucket_P == which
        return accuracy(margin_P[is_in_P], prompt_P[is_in_P]) if is_in_P.any() else None

    longer, similar, shorter = among(1), among(0), among(-1)
    difference_P = (chosen_P - rejected_P).astype(np.float64)
    both_margins_P = np.concatenate([margin_P, -margin_P])  # which answer comes first means nothing
    both_lengths_P = np.concatenate([difference_P, -difference_P])
    coefficients = preference_regression(margin_P, difference_P)
    return LengthBias(
        unit=unit,
        longer_wins=longer_wins(chosen_P, rejected_P),
        chosen_longer=longer,
        similar=similar,
        chosen_shorter=shorter,
        controlled=None if longer is None or shorter is None else (longer.half + shorter.half) / 2,
        correlation=correlation(both_margins_P, both_lengths_P),
        rank_correlation=correlation(both_margins_P, both_lengths_P, ranks=True),
        reward_coefficient=None if coefficients is None else coefficients[0],
        length_coefficient=None if coefficients is None else coefficients[1],
    )


def preference_regression(margin_P: FloatArray, difference_P: FloatArray) -> tuple[float, float] | None:
    """Coefficients of margin and length difference, each divided by its root mean square, in a logistic regression.

    The outcome is that chosen was preferred, which is true of every pair; without intercept this is the regression of
    the preference between two answers in any order. Newton's method on a convex function.

    Args:
        margin_P: reward of chosen minus reward of rejected [P].
        difference_P: length of chosen minus length of rejected [P].

    Returns:
        None where there is no finite optimum (a direction separates all pairs), or one of both does not vary.
    """
    scale = np.sqrt([(margin_P**2).mean(), (difference_P**2).mean()])
    if not (scale > 0).all():
        return None
    features_P2 = np.stack([margin_P, difference_P], axis=1) / scale
    weight = np.zeros(2)
    for _ in range(_STEPS):
        likely_P = 1 / (1 + np.exp(-np.clip(features_P2 @ weight, -500, 500)))
        gradient = features_P2.T @ (1 - likely_P)
        curvature = (features_P2 * (likely_P * (1 - likely_P))[:, None]).T @ features_P2
        if np.linalg.cond(curvature) > 1e12:
            return None
        step = np.linalg.solve(curvature, gradient)
        weight = weight + step
        if np.abs(weight).max() > 1e3:
            return None
        if np.abs(step).max() < 1e-10:
            return float(weight[0]), float(weight[1])
    return None
