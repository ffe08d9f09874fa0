"""All that an evaluation says of one model on one set of pairs: rewards in, a frozen `Evaluation` out.

Decides: which pairs are judged (those with two finite rewards of which the data calls one better), what a label-noise
suspect is, and how many worst errors are kept.

Shapes: P pairs that are judged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.calibration import Calibration, calibrate, loss_P, sigmoid, temperatures_of_halves
from btrm_core.evaluation.length import LengthBias, length_bias
from btrm_core.evaluation.scores import UNKNOWN, PairRewards
from btrm_core.evaluation.statistics import LARGEST, Accuracy, accuracy, clusters, wins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

BUCKETS = 5
SUSPICIOUS = 0.05
"""A pair whose chosen answer the calibrated model gives less than this chance is a suspect of label noise."""
KEPT = 100
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Bucket:
    """Pairs whose margin is from `low` to `high`.

    Attributes:
        low: the smallest of their margins, or of the sizes of these.
        high: the largest.
        accuracy: of these pairs.
    """

    low: float
    high: float
    accuracy: Accuracy


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and quantiles of numbers.

    Attributes:
        mean: of all.
        std: standard deviation.
        smallest: of all.
        largest: of all.
        quantiles: at 1, 5, 25, 50, 75, 95 and 99 %.
    """

    mean: float
    std: float
    smallest: float
    largest: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class RewardSpread:
    """How rewards are distributed.

    Attributes:
        chosen: of the chosen answers.
        rejected: of the rejected answers.
        margin: of the reward margins.
        separation: chance that a chosen answer has a higher reward than a rejected one of any prompt (area under the
            ROC curve); far below the accuracy where a reward says more of the prompt than of the answer.
        between_prompts: share of the rewards' variance between prompts; None where no reward varies.
    """

    chosen: Spread
    rejected: Spread
    margin: Spread
    separation: float
    between_prompts: float | None


@dataclass(frozen=True)
class SubsetEvaluation:
    """One named part of the pairs.

    Attributes:
        name: of the part; empty for pairs without a subset.
        accuracy: under three conventions for ties, with intervals.
        loss: mean negative log-likelihood of its pairs, in nats.
        reward_margin: mean of chosen less rejected.
    """

    name: str
    accuracy: Accuracy
    loss: float
    reward_margin: float


@dataclass(frozen=True)
class PairCase:
    """A pair worth reading.

    Attributes:
        place: where it is among the pairs given.
        id: its id.
        subset: its subset.
        chosen_reward: reward of the answer that the data prefers.
        rejected_reward: reward of the other one.
        probability: of the chosen answer being better, as the calibrated rewards say.
    """

    place: int
    id: str
    subset: str
    chosen_reward: float
    rejected_reward: float
    probability: float


@dataclass(frozen=True)
class Evaluation:
    """What rewards say of pairs.

    Attributes:
        model: what gave the rewards.
        data: where the pairs are from.
        given: all pairs of the set.
        undecided: left out, because the data calls both answers equally good.
        unscored: left out, because a reward is missing or not finite.
        accuracy: over all pairs that are left.
        calibration: negative log-likelihood, Brier score, calibration error, before and after a temperature.
        by_margin: accuracy by the size of the reward margin, in fifths of the pairs.
        by_data_margin: accuracy by the margin that the data gives; empty where it gives none.
        risk_area: area under the curve of error over coverage, most confident pairs first; lower is better.
        length: by tokens, then by characters, as far as they are known.
        rewards: their distribution.
        subsets: every named part by itself; empty for a single one.
        subset_mean: mean of the subsets' accuracies, each counting the same; None without subsets.
        worst: the wrong pairs, those first that the calibrated rewards are surest of; at most 100.
        suspects: how many pairs are suspects of label noise: the calibrated rewards give the chosen answer less than
            5 %; None without a temperature. They are the first of `worst`.
    """

    model: str
    data: str
    given: int
    undecided: int
    unscored: int
    accuracy: Accuracy
    calibration: Calibration
    by_margin: tuple[Bucket, ...]
    by_data_margin: tuple[Bucket, ...]
    risk_area: float
    length: tuple[LengthBias, ...]
    rewards: RewardSpread
    subsets: tuple[SubsetEvaluation, ...]
    subset_mean: float | None
    worst: tuple[PairCase, ...]
    suspects: int | None

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        return asdict(self)


def assess(rewards: PairRewards) -> Evaluation:
    """Evaluate the rewards of pairs.

    Args:
        rewards: the pairs; those without two finite rewards and those the data calls ties are left out and counted.

    Raises:
        DataError: no pair is left.
    """
    places, undecided, unscored = judged_places(rewards)
    kept = rewards.select(places)
    margin_P, prompt_P = kept.margin_P, clusters(kept.prompt_P, len(kept))
    soft_P = kept.probability_P if (kept.probability_P < 1).any() else None
    subsets = _subsets(kept, margin_P, prompt_P)
    worst, suspects = _worst(kept, places, margin_P, prompt_P, soft_P)
    return Evaluation(
        model=rewards.model,
        data=rewards.data,
        given=len(rewards),
        undecided=undecided,
        unscored=unscored,
        accuracy=accuracy(margin_P, prompt_P),
        calibration=calibrate(margin_P, prompt_P, soft_P),
        by_margin=_by_size(np.abs(margin_P), margin_P, prompt_P),
        by_data_margin=_by_data_margin(kept.data_margin_P, margin_P, prompt_P),
        risk_area=_risk_area(margin_P),
        length=_length(kept, margin_P, prompt_P),
        rewards=_reward_spread(kept.reward_P2, prompt_P),
        subsets=subsets,
        subset_mean=sum(part.accuracy.half for part in subsets) / len(subsets) if subsets else None,
        worst=worst,
        suspects=suspects,
    )


def judged_places(rewards: PairRewards) -> tuple[IntArray, int, int]:
    """Where the pairs are that can be judged, and how many are undecided and how many unscored.

    Args:
        rewards: of any pairs; one is judged if its probability is above 0.5 and both rewards are finite (below 1e100).

    Returns:
        The places, int64 [judged pairs], ascending; the number of ties in the data, and of decided pairs without two
        finite rewards.

    Raises:
        DataError: there is none.
    """
    is_decided_P = rewards.probability_P > 0.5
    is_scored_P = (np.abs(rewards.reward_P2) < LARGEST).all(axis=1)
    places: IntArray = np.flatnonzero(is_decided_P & is_scored_P).astype(np.int64)
    undecided = int((~is_decided_P).sum())
    unscored = int((is_decided_P & ~is_scored_P).sum())
    if not len(places):
        where = f" of {rewards.data}"
        if not len(rewards):
            raise DataError(f"there are no pairs to evaluate{where}; expected at least one")
        if not unscored:
            raise DataError(
                f"every evaluation pair{where} is a tie (probability 0.5); expected pairs of which one answer is better"
            )
        raise DataError(
            f"none of the {len(rewards):,} pairs{where} has two finite rewards; expected a number for both answers"
        )
    return places, undecided, unscored


def _by_size(size_P: FloatArray, margin_P: FloatArray, prompt_P: IntArray) -> tuple[Bucket, ...]:
    order_P = np.argsort(size_P, kind="stable")
    parts = [part for part in np.array_split(order_P, min(BUCKETS, len(order_P))) if len(part)]
    return tuple(
        Bucket(float(size_P[p].min()), float(size_P[p].max()), accuracy(margin_P[p], prompt_P[p])) for p in parts
    )


def _by_data_margin(data_margin_P: FloatArray, margin_P: FloatArray, prompt_P: IntArray) -> tuple[Bucket, ...]:
    """A bucket per margin where the data has few different ones, else fifths."""
    known = np.flatnonzero(np.isfinite(data_margin_P))
    values = np.unique(data_margin_P[known])
    if len(values) < 2:
        return ()
    if len(values) > 2 * BUCKETS:
        return _by_size(data_margin_P[known], margin_P[known], prompt_P[known])
    parts = [known[data_margin_P[known] == value] for value in values]
    return tuple(
        Bucket(float(value), float(value), accuracy(margin_P[part], prompt_P[part]))
        for value, part in zip(values, parts, strict=True)
    )


def _risk_area(margin_P: FloatArray) -> float:
    order_P = np.argsort(-np.abs(margin_P), kind="stable")
    wrong_P = 1 - wins(margin_P[order_P])
    return float((np.cumsum(wrong_P) / np.arange(1, len(wrong_P) + 1)).mean())


def _length(kept: PairRewards, margin_P: FloatArray, prompt_P: IntArray) -> tuple[LengthBias, ...]:
    found = []
    for unit, length_P2 in (("tokens", kept.tokens_P2), ("characters", kept.characters_P2)):
        is_known_P = (length_P2 != UNKNOWN).all(axis=1)
        if is_known_P.all():
            found.append(length_bias(margin_P, length_P2[:, 0], length_P2[:, 1], prompt_P, unit))
    return tuple(found)


def spread(value_P: FloatArray) -> Spread:
    """Mean, standard deviation and quantiles of at least one number.

    Args:
        value_P: finite rewards or margins [P].
    """
    quantiles = tuple(float(q) for q in np.quantile(value_P, _QUANTILES))
    return Spread(float(value_P.mean()), float(value_P.std()), float(value_P.min()), float(value_P.max()), quantiles)


def _reward_spread(reward_P2: FloatArray, prompt_P: IntArray) -> RewardSpread:
    chosen_P, rejected_P = reward_P2[:, 0], reward_P2[:, 1]
    sorted_P = np.sort(rejected_P)
    below_P = np.searchsorted(sorted_P, chosen_P, side="left")
    equal_P = np.searchsorted(sorted_P, chosen_P, side="right") - below_P
    all_S, prompt_S = reward_P2.reshape(-1), np.repeat(prompt_P, 2)
    total = float(all_S.var())
    count_G = np.bincount(prompt_S)
    mean_G = np.bincount(prompt_S, weights=all_S) / count_G
    return RewardSpread(
        chosen=spread(chosen_P),
        rejected=spread(rejected_P),
        margin=spread(chosen_P - rejected_P),
        separation=float((below_P + 0.5 * equal_P).mean() / len(rejected_P)),
        between_prompts=float(((mean_G[prompt_S] - all_S.mean()) ** 2).mean() / total) if total > 0 else None,
    )


def _subsets(kept: PairRewards, margin_P: FloatArray, prompt_P: IntArray) -> tuple[SubsetEvaluation, ...]:
    label_P = np.array(kept.subset_P, dtype=object)
    names = sorted(set(kept.subset_P))
    if len(names) < 2:
        return ()
    found = []
    for name in names:
        is_in_P = label_P == name
        within_P = margin_P[is_in_P]
        soft_P = kept.probability_P[is_in_P]
        found.append(
            SubsetEvaluation(
                name,
                accuracy(within_P, prompt_P[is_in_P]),
                float(loss_P(within_P, soft_P).mean()),
                float(within_P.mean()),
            )
        )
    return tuple(found)


def _worst(
    kept: PairRewards, places: IntArray, margin_P: FloatArray, prompt_P: IntArray, soft_P: FloatArray | None
) -> tuple[tuple[PairCase, ...], int | None]:
    """Wrong pairs by margin, and how many pairs contradict their label with calibrated confidence."""
    half_P, temperatures = temperatures_of_halves(margin_P, prompt_P, soft_P)
    scale_P = np.ones(len(margin_P)) if temperatures is None else np.array(temperatures)[half_P]
    likely_P = sigmoid(margin_P / scale_P)
    order_P = [int(i) for i in np.argsort(margin_P / scale_P, kind="stable")[:KEPT] if margin_P[i] < 0]
    cases = tuple(
        PairCase(
            int(places[i]),
            kept.id_P[i],
            kept.subset_P[i],
            float(kept.reward_P2[i, 0]),
            float(kept.reward_P2[i, 1]),
            float(likely_P[i]),
        )
        for i in order_P
    )
    return cases, None if temperatures is None else int((likely_P < SUSPICIOUS).sum())
