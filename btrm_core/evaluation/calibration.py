"""Do rewards mean what Bradley-Terry says? p = sigmoid(reward margin / T) against what the data says.

Decides: 15 bins of equal numbers of pairs; a temperature is fitted on one half of the prompts and judged on the other,
both ways round, so that no pair is judged with a temperature it helped to find.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.evaluation.statistics import clusters, wins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

BINS = 15
_WIDEST = 1e4
"""How far from the spread of the margins a temperature is looked for; one at the end is none."""


@dataclass(frozen=True)
class Bin:
    """Pairs of about equal confidence.

    Attributes:
        pairs: how many.
        confidence: mean of their confidence, 0.5 to 1.
        accuracy: how often the confident side was right, 0 to 1.
    """

    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How good probabilities are.

    Attributes:
        loss: mean negative log-likelihood in nats; ln 2 = 0.6931 is what "no idea" gets.
        brier: mean squared error of the probability; 0.25 is what "no idea" gets.
        ece: expected calibration error over bins of equal numbers of pairs.
        bins: the pairs by rising confidence.
    """

    loss: float
    brier: float
    ece: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Calibration:
    """Reliability of the rewards as they are, and with a temperature.

    Attributes:
        before: with temperature 1.
        after: each half of the prompts with the temperature of the other half; None where none can be fitted.
        temperature: fitted on all pairs, for use elsewhere; None where none fits best, as when nothing is wrong.
        halves: the two temperatures that `after` is judged with.
    """

    before: Reliability
    after: Reliability | None
    temperature: float | None
    halves: tuple[float, float] | None


def sigmoid(value_P: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)) of every number without overflow, float64 [P].

    Args:
        value_P: any numbers [P], infinite ones included.
    """
    out_P: FloatArray = np.exp(-np.logaddexp(0.0, -value_P))
    return out_P


def loss_P(margin_P: FloatArray, probability_P: FloatArray | None = None) -> FloatArray:
    """Negative log-likelihood of every pair in nats, float64 [P], with soft labels where there are.

    Args:
        margin_P: reward of chosen minus reward of rejected [P].
        probability_P: how likely chosen is the better one [P], 0 to 1; None is 1 everywhere.
    """
    lost_P: FloatArray = np.logaddexp(0.0, -margin_P)
    if probability_P is not None:
        lost_P = probability_P * lost_P + (1 - probability_P) * np.logaddexp(0.0, margin_P)
    return lost_P


def reliability(margin_P: FloatArray, probability_P: FloatArray | None = None, bins: int = BINS) -> Reliability:
    """Negative log-likelihood, Brier score and expected calibration error of reward margins.

    Args:
        margin_P: finite reward margins divided by the temperature, at least one.
        probability_P: how likely it is that chosen is better, as the data says; None for certain.
        bins: at most so many bins; fewer where there are fewer pairs.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599; Nguyen and O'Connor,
        arXiv:1508.05154, for bins of equal mass.
    """
    likely_P = sigmoid(margin_P)
    target_P = np.ones_like(margin_P) if probability_P is None else np.asarray(probability_P, dtype=np.float64)
    confidence_P = np.maximum(likely_P, 1 - likely_P)
    # Soft labels: the confident side is right as often as the data says. Equal rewards are right half the time.
    won_P = wins(margin_P)
    right_P = won_P * target_P + (1 - won_P) * (1 - target_P)
    order_P = np.argsort(confidence_P, kind="stable")
    parts = [part for part in np.array_split(order_P, min(bins, len(order_P))) if len(part)]
    found = tuple(Bin(len(p), float(confidence_P[p].mean()), float(right_P[p].mean())) for p in parts)
    return Reliability(
        loss=float(loss_P(margin_P, target_P).mean()),
        brier=float(((likely_P - target_P) ** 2).mean()),
        ece=sum(one.pairs * abs(one.confidence - one.accuracy) for one in found) / len(margin_P),
        bins=found,
    )


def fit_temperature(margin_P: FloatArray, probability_P: FloatArray | None = None) -> float | None:
    """The temperature with the lowest negative log-likelihood; None where the best is 0, infinite or anything.

    Args:
        margin_P: reward margins [P]; the temperature is what they are divided by.
        probability_P: how likely chosen is the better one [P]; None is 1 everywhere.
    """
    from scipy.optimize import minimize_scalar

    spread = float(np.sqrt(np.mean(margin_P**2))) if len(margin_P) else 0.0
    if spread == 0.0:
        return None
    scaled_P = margin_P / spread

    def lost(log_temperature: float) -> float:
        return float(loss_P(scaled_P / math.exp(log_temperature), probability_P).mean())

    end = math.log(_WIDEST)
    found = minimize_scalar(lost, bounds=(-end, end), method="bounded", options={"xatol": 1e-7})
    # With nothing wrong the loss only falls towards 0; with more wrong than right it only falls towards infinity.
    best = float(found.x)
    flat = lost(best) >= min(lost(-end), lost(end)) - 1e-12
    return None if flat or abs(abs(best) - end) < 1e-2 else spread * math.exp(best)


def calibrate(
    margin_P: FloatArray, prompt_P: NDArray[Any] | None = None, probability_P: FloatArray | None = None
) -> Calibration:
    """Reliability before and after a temperature that is fitted on other prompts than it is judged on.

    Args:
        margin_P: reward margins [P].
        prompt_P: prompts [P]; pairs of one prompt stay in one half. None: each pair has its own.
        probability_P: how likely chosen is the better one [P]; None is 1 everywhere.

    Returns:
        `after` is None where a half has no best temperature; `temperature` is that of all pairs.
    """
    halves_P, temperatures = temperatures_of_halves(margin_P, prompt_P, probability_P)
    after = None
    if temperatures is not None:
        after = reliability(margin_P / np.array(temperatures)[halves_P], probability_P)
    return Calibration(
        before=reliability(margin_P, probability_P),
        after=after,
        temperature=fit_temperature(margin_P, probability_P),
        halves=temperatures,
    )


def temperatures_of_halves(
    margin_P: FloatArray, prompt_P: NDArray[Any] | None, probability_P: FloatArray | None = None
) -> tuple[NDArray[np.int64], tuple[float, float] | None]:
    """Which half every pair is in, and the temperatures to judge the halves with: each is fitted on the other one.

    Args:
        margin_P: reward margins [P].
        prompt_P: prompts [P], which are never split; None: each pair has its own.
        probability_P: how likely chosen is the better one [P]; None is 1 everywhere.

    Returns:
        0 or 1 for every pair [P], the same at every call; and the temperature for half 0 and for half 1, or None if
        either half has no best one.
    """
    cluster_P = clusters(prompt_P, len(margin_P))
    shuffled_G = np.random.default_rng(0).permutation(int(cluster_P.max()) + 1)
    half_P: NDArray[np.int64] = shuffled_G[cluster_P] % 2
    fitted: list[float] = []
    for half in (1, 0):
        is_other_P = half_P == half
        soft_P = None if probability_P is None else probability_P[is_other_P]
        temperature = fit_temperature(margin_P[is_other_P], soft_P)
        if temperature is None:
            return half_P, None
        fitted.append(temperature)
    return half_P, (fitted[0], fitted[1])
