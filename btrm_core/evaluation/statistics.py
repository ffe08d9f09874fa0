"""Shares, their errors, and what resampling says of any figure: the statistics that every evaluation rests on.

Decides: that an accuracy has three conventions for ties, that its interval is Wilson's, and that everything else is
resampled by prompt, because pairs of one prompt are not independent. Resampling is seeded: equal rewards give equal
reports.

Shapes: P pairs, G prompts, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

LEVEL = 0.95
"""Coverage of every interval."""
LARGEST = 1e100
"""A number beyond this size is none that can be judged: its square is no number any more."""
DRAWS = 2000
SEED = 20_26
_DRAWN_TOGETHER = 250_000
"""Numbers that are drawn at once: they stay in a core's own memory, and the draws do not depend on it."""


@dataclass(frozen=True)
class Interval:
    """Where a figure lies with 95 % confidence.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Accuracy:
    """How often the chosen answer got the higher reward.

    Attributes:
        pairs: how many were judged.
        correct: pairs whose chosen answer has the higher reward.
        ties: pairs with equal rewards.
        half: accuracy where a tie counts half; the one that is meant where nothing else is said.
        strict: accuracy where a tie is wrong, as in RewardBench.
        excluded: accuracy among the pairs without tie; None if all are ties.
        wilson: interval of `half`, as if all pairs were independent.
        bootstrap: interval of `half`, resampled by prompt; None for a single prompt.
        prompts: how many different prompts the pairs have.
    """

    pairs: int
    correct: int
    ties: int
    half: float
    strict: float
    excluded: float | None
    wilson: Interval
    bootstrap: Interval | None
    prompts: int

    @property
    def interval(self) -> Interval:
        """The wider of both intervals: resampling is too narrow near 0 and 1, Wilson's with several pairs a prompt."""
        if self.bootstrap is None or self.wilson.half_width >= self.bootstrap.half_width:
            return self.wilson
        return self.bootstrap


def z_value(level: float = LEVEL) -> float:
    """Standard normal quantile of a two-sided interval.

    Args:
        level: how often the interval should hold the truth, above 0 and below 1.

    >>> round(z_value(0.95), 4)
    1.96
    """
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: float, number: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share; half successes (ties) are allowed.

    Args:
        successes: 0 to `number`.
        number: observations.
        level: how often the interval should hold the truth.

    Reference:
        Wilson 1927, Probable inference, the law of succession, and statistical inference.

    Raises:
        ValueError: there is no observation.

    >>> wilson(0, 10).low
    0.0
    """
    if number < 1:
        raise ValueError("an interval of a share needs at least one observation")
    share, z = successes / number, z_value(level)
    shrunk = 1 + z * z / number
    centre = (share + z * z / (2 * number)) / shrunk
    half = z / shrunk * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= number else min(1.0, centre + half)
    return Interval(low, high)


def standard_error(accuracy: float, pairs: int) -> float:
    """Standard error of a share of `pairs` independent pairs, sqrt(p (1 - p) / n); NaN without a pair.

    Args:
        accuracy: 0 to 1.
        pairs: n.
    """
    return math.sqrt(max(0.0, accuracy * (1 - accuracy)) / pairs) if pairs else math.nan


def wins(margin_P: FloatArray) -> FloatArray:
    """1 where the chosen answer has the higher reward, 0.5 for equal rewards, else 0; float64 [P].

    Args:
        margin_P: reward of chosen minus reward of rejected [P]; NaN counts as 0 won.
    """
    won_P: FloatArray = (margin_P > 0) + 0.5 * (margin_P == 0)
    return won_P


def accuracy(margin_P: FloatArray, prompt_P: NDArray[Any] | None = None, *, draws: int = DRAWS) -> Accuracy:
    """Accuracy of reward margins (chosen minus rejected) under three conventions for ties, with intervals.

    Args:
        margin_P: finite reward margins, at least one.
        prompt_P: one number per pair, equal for equal prompts; None takes every pair for independent.
        draws: of the resampling.

    Raises:
        ValueError: there is no pair.
    """
    pairs = len(margin_P)
    correct, ties = int((margin_P > 0).sum()), int((margin_P == 0).sum())
    interval = wilson(correct + 0.5 * ties, pairs)
    cluster_P = clusters(prompt_P, pairs)
    return Accuracy(
        pairs=pairs,
        correct=correct,
        ties=ties,
        half=(correct + 0.5 * ties) / pairs,
        strict=correct / pairs,
        excluded=correct / (pairs - ties) if ties < pairs else None,
        wilson=interval,
        bootstrap=bootstrap_mean(wins(margin_P), cluster_P, draws=draws),
        prompts=int(cluster_P.max()) + 1,
    )


def clusters(prompt_P: NDArray[Any] | None, pairs: int) -> IntArray:
    """Number the prompts from 0, int64 [P]; without prompts every pair is its own.

    Args:
        prompt_P: anything that can be sorted [P], equal for equal prompts.
        pairs: P, for when there are no prompts.
    """
    if prompt_P is None:
        return np.arange(pairs, dtype=np.int64)
    number_P: IntArray = np.unique(prompt_P, return_inverse=True)[1].astype(np.int64)
    return number_P


def bootstrap_mean(value_P: FloatArray, cluster_P: IntArray, *, draws: int = DRAWS) -> Interval | None:
    """Percentile interval of a mean, whole prompts drawn with replacement; None for fewer than two prompts.

    Args:
        value_P: the numbers [P].
        cluster_P: number of each one's prompt [P], from 0 without gaps.
        draws: how many samples.
    """
    means_B = bootstrap_means(value_P, cluster_P, draws=draws)
    return None if means_B is None else percentiles(means_B)


def bootstrap_means(value_P: FloatArray, cluster_P: IntArray, *, draws: int = DRAWS) -> FloatArray | None:
    """Means [B] of samples of whole prompts; None for fewer than two prompts.

    Only the sums of each prompt are drawn, so the time does not depend on the pairs a prompt has.

    Args:
        value_P: the numbers [P].
        cluster_P: number of each one's prompt [P], from 0 without gaps.
        draws: B; the seed is always the same.
    """
    sum_G = np.bincount(cluster_P, weights=value_P)
    count_G = np.bincount(cluster_P).astype(np.float64)
    prompts = len(sum_G)
    if prompts < 2:
        return None
    generator = np.random.default_rng(SEED)
    together = max(1, _DRAWN_TOGETHER // prompts)
    alike = float(count_G[0]) * prompts if np.all(count_G == count_G[0]) else None  # then every draw has as many pairs
    means: list[FloatArray] = []
    for start in range(0, draws, together):
        drawn = generator.integers(0, prompts, size=(min(together, draws - start), prompts))
        pairs = count_G.take(drawn).sum(axis=1) if alike is None else alike
        means.append(sum_G.take(drawn).sum(axis=1) / pairs)
    return np.concatenate(means)


def bootstrap(
    statistic: Callable[[IntArray], float], cluster_P: IntArray, *, draws: int = DRAWS // 4
) -> Interval | None:
    """Percentile interval of any figure of the pairs, whole prompts drawn with replacement.

    Args:
        statistic: the figure of the pairs at these places; NaN where it has none.
        cluster_P: numbers of the prompts from 0.
        draws: how often.

    Returns:
        None for fewer than two prompts, or where half of the samples have no such figure.
    """
    order_P = np.argsort(cluster_P, kind="stable")
    start_G = np.searchsorted(cluster_P[order_P], np.arange(int(cluster_P.max()) + 2))
    prompts = len(start_G) - 1
    if prompts < 2:
        return None
    generator = np.random.default_rng(SEED)
    values = []
    for _ in range(draws):
        drawn_G = generator.integers(0, prompts, size=prompts)
        first_G, length_G = start_G[drawn_G], start_G[drawn_G + 1] - start_G[drawn_G]
        inside = np.arange(int(length_G.sum())) - np.repeat(np.cumsum(length_G) - length_G, length_G)
        values.append(statistic(order_P[np.repeat(first_G, length_G) + inside]))
    found_B = np.array(values, dtype=np.float64)
    found_B = found_B[np.isfinite(found_B)]
    return percentiles(found_B) if len(found_B) > draws // 2 else None


def percentiles(values_B: FloatArray, level: float = LEVEL) -> Interval:
    """The middle `level` of values.

    Args:
        values_B: what was drawn [B].
        level: share of the values between both ends.
    """
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def holm(p_values: list[float]) -> list[float]:
    """P values of several tests, corrected so that the chance of a single false finding stays below the level.

    Args:
        p_values: uncorrected, in any order.

    Returns:
        Corrected ones in the same order, at most 1.

    Reference:
        Holm 1979, A simple sequentially rejective multiple test procedure.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def correlation(first_P: FloatArray, second_P: FloatArray, *, ranks: bool = False) -> float | None:
    """Pearson's correlation, or Spearman's of the ranks; None where one side does not vary.

    Args:
        first_P: numbers [P].
        second_P: numbers of the same things [P].
        ranks: Spearman's; equal numbers share their mean rank.
    """
    if ranks:
        from scipy.stats import rankdata

        first_P, second_P = rankdata(first_P), rankdata(second_P)
    if len(first_P) < 2 or np.ptp(first_P) == 0 or np.ptp(second_P) == 0:
        return None
    return float(np.corrcoef(first_P, second_P)[0, 1])
