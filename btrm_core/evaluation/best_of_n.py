"""Best of N: how good is the answer with the highest reward among n, as a gold value says?

Decides: the expectation over all n of the N answers is exact (without replacement), so no draw is left to chance.

Shapes: N answers to a prompt, G prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.statistics import LARGEST, Interval, bootstrap_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BestOf:
    """Best of n.

    Attributes:
        n: answers to choose from.
        gold: expected gold value of the answer with the highest reward, mean over prompts.
        interval: of `gold`, resampled by prompt; None for a single prompt.
        oracle: expected gold value of the best of n by gold itself.
        random: mean gold value: what choosing blindly gets.
        kl: divergence from the policy that wrote the answers in nats, log n - (n - 1) / n.
        regret: oracle minus gold.
    """

    n: int
    gold: float
    interval: Interval | None
    oracle: float
    random: float
    kl: float
    regret: float


@dataclass(frozen=True)
class BestOfN:
    """The curve over n, up to the fewest answers a prompt has.

    Attributes:
        prompts: how many.
        left_out: prompts left out: fewer than two answers, or a reward or gold value missing or not finite.
        curve: one entry per n.
    """

    prompts: int
    left_out: int
    curve: tuple[BestOf, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def best_of_n(rewards: Sequence[ArrayLike], gold: Sequence[ArrayLike]) -> BestOfN:
    """Expected gold value of the answer with the highest reward, for every n.

    Args:
        rewards: for every prompt the rewards of its answers.
        gold: for every prompt the gold values of the same answers.

    Raises:
        DataError: the lists do not match, or no prompt is left.
    """
    if len(rewards) != len(gold):
        raise DataError(f"{len(rewards)} lists of rewards and {len(gold)} of gold values; expected one each per prompt")
    groups: list[tuple[FloatArray, FloatArray]] = []
    for place, (given, true) in enumerate(zip(rewards, gold, strict=True)):
        reward_N, gold_N = np.asarray(given, dtype=np.float64), np.asarray(true, dtype=np.float64)
        if reward_N.shape != gold_N.shape:
            raise DataError(f"prompt {place + 1} has {reward_N.size} rewards and {gold_N.size} gold values")
        if reward_N.size >= 2 and (np.abs([reward_N, gold_N]) < LARGEST).all():
            groups.append((reward_N, gold_N))
    if not groups:
        raise DataError("no prompt has two answers with finite rewards and gold values; best of n needs a choice")
    largest = min(len(gold_N) for _, gold_N in groups)
    chosen_GN = np.array([expected_best(reward_N, gold_N, largest) for reward_N, gold_N in groups])
    oracle_GN = np.array([expected_best(gold_N, gold_N, largest) for _, gold_N in groups])
    blind = float(np.mean([gold_N.mean() for _, gold_N in groups]))
    cluster_G = np.arange(len(groups))
    curve = []
    for n in range(1, largest + 1):
        chosen, oracle = float(chosen_GN[:, n - 1].mean()), float(oracle_GN[:, n - 1].mean())
        interval = bootstrap_mean(chosen_GN[:, n - 1], cluster_G)
        curve.append(BestOf(n, chosen, interval, oracle, blind, math.log(n) - (n - 1) / n, oracle - chosen))
    return BestOfN(len(groups), len(rewards) - len(groups), tuple(curve))


def expected_best(reward_N: FloatArray, gold_N: FloatArray, largest: int) -> FloatArray:
    """Expected gold value of the answer with the highest reward among n of N, for n = 1 to `largest`.

    The answer of rank i (from 0, lowest reward first) is the best of comb(i, n - 1) of all comb(N, n) choices. Among
    answers of equal reward each is as likely to be taken, so each stands for their mean gold value.

    Args:
        reward_N: rewards [N] of the answers to one prompt.
        gold_N: what the answers are worth [N], in the same order.
        largest: the largest n, at most N.

    Returns:
        One expected gold value per n [largest].

    >>> expected_best(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0]), 3).round(4).tolist()
    [0.3333, 0.3333, 0.0]
    """
    number = len(reward_N)
    _, which_N = np.unique(reward_N, return_inverse=True)
    mean_U = np.bincount(which_N, weights=gold_N) / np.bincount(which_N)
    ordered_N = mean_U[np.sort(which_N)]
    out = []
    chance_N = np.full(number, 1 / number)  # comb(i, n - 1) / comb(N, n), from n to n + 1 without large numbers
    rank_N = np.arange(number)
    for n in range(1, largest + 1):
        out.append(float(chance_N @ ordered_N))
        if n < largest:
            chance_N = chance_N * (rank_N - n + 1) / n * (n + 1) / (number - n)
    return np.array(out)
