"""Rewards of pairs turned into an evaluation: accuracy with its error, the length baseline beside it, each subset.

Arrays in, figures out: nothing here knows a model.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import ConfigError, DataError, did_you_mean
from btrm_core.evaluation.calibration import reliability
from btrm_core.evaluation.statistics import LARGEST, standard_error, wilson, wins

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """What the data says of P pairs, as far as an evaluation looks at it.

    Attributes:
        longer_by_P: by how many tokens the chosen conversation is longer, int64.
        probability_P: that the chosen one is better; 0.5 is a tie.
        subset_P: the subset of every pair, empty for none.
        sets: parts that are reported as a whole beside their subsets, which are called SET/SUBSET.
    """

    longer_by_P: NDArray[np.int64]
    probability_P: NDArray[np.floating[Any]]
    subset_P: Sequence[str]
    sets: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.probability_P)

    @staticmethod
    def joined(parts: Sequence[Judged]) -> Judged:
        """Pairs of several sources one after another.

        Args:
            parts: at least one; their order is kept.
        """
        return Judged(
            np.concatenate([part.longer_by_P for part in parts]),
            np.concatenate([part.probability_P for part in parts]),
            [name for part in parts for name in part.subset_P],
        )


class NoRewardsError(DataError):
    """The model that is evaluated gives no pair two finite rewards."""


def require_decided(judged: Judged) -> None:
    """Refuse pairs that decide nothing, before rewards are computed for them.

    Args:
        judged: what the data says of the pairs.

    Raises:
        DataError: all pairs are ties.
    """
    if not (np.asarray(judged.probability_P) > 0.5).any():
        raise DataError(
            "every evaluation pair is a tie (probability 0.5); expected pairs of which one answer is better"
        )


def figures_of(judged: Judged, rewards_P2: FloatArray) -> dict[str, Any]:
    """The cheap figures of an evaluation, as often as training asks; equal rewards count half and are reported.

    The loss is plain Bradley-Terry; `accuracy_interval` is Wilson's, as if all pairs were independent.

    `longer_wins_tokens` is the accuracy of always preferring the conversation with more tokens, on the same pairs.
    Pairs whose answers the data calls equally good decide nothing: they are left out and counted as `undecided`, and
    those without two finite rewards as `unscored`.

    Args:
        judged: what the data says of the pairs.
        rewards_P2: their rewards, chosen and rejected.

    Raises:
        DataError: all pairs are ties.
        NoRewardsError: none that is no tie has two finite rewards.
    """
    require_decided(judged)
    decided_P = np.asarray(judged.probability_P) > 0.5
    kept_P = decided_P & (np.abs(rewards_P2) < LARGEST).all(axis=1)
    if not kept_P.any():
        raise NoRewardsError(
            f"none of the {int(decided_P.sum()):,} evaluation pairs has two finite rewards; the model is broken, which "
            "a lower --learning-rate or --dtype fp32 may prevent"
        )
    rewards_K2 = np.asarray(rewards_P2, dtype=np.float64)[kept_P]
    out = _reward_figures(rewards_K2)
    out["accuracy_standard_error"] = standard_error(out["accuracy"], out["pairs"])
    interval = wilson(out["accuracy"] * out["pairs"], out["pairs"])
    out["accuracy_interval"] = [interval.low, interval.high]
    longer = judged.longer_by_P[kept_P]
    out["longer_wins_tokens"] = float(((longer > 0) + 0.5 * (longer == 0)).mean())
    left_out = {"undecided": int((~decided_P).sum()), "unscored": int((decided_P & ~kept_P).sum())}
    out |= {why: number for why, number in left_out.items() if number}
    names = [judged.subset_P[int(i)] for i in np.flatnonzero(kept_P)]
    if len({judged.subset_P[int(i)] for i in np.flatnonzero(decided_P)}) > 1:
        out["subsets"] = [vars(row) for row in by_subset(names, rewards_K2[:, 0] - rewards_K2[:, 1], judged.sets)]
    return out


def _reward_figures(rewards_P2: FloatArray) -> dict[str, Any]:
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    ties = int((margin_P == 0).sum())
    mean, std = rewards_P2.mean(axis=0), rewards_P2.std(axis=0)
    probabilities = reliability(margin_P)
    return {
        "loss": probabilities.loss,
        "brier": probabilities.brier,
        "ece": probabilities.ece,
        "accuracy": float(((margin_P > 0).sum() + 0.5 * ties) / len(margin_P)),
        "ties": ties,
        "reward_margin": float(margin_P.mean()),
        "reward_margin_std": float(margin_P.std()),
        "chosen_mean": float(mean[0]),
        "chosen_std": float(std[0]),
        "rejected_mean": float(mean[1]),
        "rejected_std": float(std[1]),
        "pairs": len(margin_P),
    }


@dataclass(frozen=True)
class SubsetResult:
    """Accuracy of one named part of the evaluation pairs.

    Attributes:
        name: of the part.
        pairs: how many.
        accuracy: share of them that are right, 0 to 1; ties count half.
        ties: pairs of two equal rewards.
        reward_margin: mean of chosen less rejected.
        loss: mean of the pairs, in nats.
        brier: mean squared error of their probabilities.
        ece: expected calibration error.
    """

    name: str
    pairs: int
    accuracy: float
    ties: int
    reward_margin: float
    loss: float
    brier: float
    ece: float


def by_subset(names: list[str], margin_P: FloatArray, sets: Sequence[str] = ()) -> list[SubsetResult]:
    """Accuracy per subset name from the reward margins of the pairs in the same order; ties count half.

    Args:
        names: subset of every pair.
        margin_P: reward margins [P].
        sets: parts of which some subsets are subsets, as SET/SUBSET.

    Returns:
        One result per subset and part, sorted by name; losses in nats.
    """
    out, labels = [], np.array(names, dtype=object)
    for name in subset_names(names, sets):
        part_P = labels == name
        if name in sets:
            part_P |= np.array([label.startswith(f"{name}/") for label in names])
        margin = margin_P[part_P]
        accuracy, ties, likely = float(wins(margin).mean()), int((margin == 0).sum()), reliability(margin)
        size = float(margin.mean())
        out.append(SubsetResult(name, len(margin), accuracy, ties, size, likely.loss, likely.brier, likely.ece))
    return out


LOWER_IS_BETTER = {"loss": True, "brier": True, "ece": True, "accuracy": False, "reward_margin": False}
"""Figures that can say which of two models is the better one."""


def subset_names(names: Sequence[str], sets: Sequence[str] = ()) -> list[str]:
    """Of which parts there are figures, in order.

    Args:
        names: the subset of every pair.
        sets: parts of which some subsets are subsets, as SET/SUBSET.
    """
    there = set(names)
    return sorted(there | {part for part in sets if any(name.startswith(f"{part}/") for name in there)})


def check_figure(name: str, subsets: Sequence[str], sets: Sequence[str] = ()) -> None:
    """Refuse a figure that an evaluation on pairs of these subsets will not have.

    Args:
        name: a figure, or one of a subset or a named set, as "chat.accuracy".
        subsets: the subset of every pair.
        sets: as for `subset_names`.

    Raises:
        ConfigError: says which there are.
    """
    known = list(LOWER_IS_BETTER)
    names = subset_names(subsets, sets)
    if names != [""]:
        known += [f"{subset}.{figure}" for subset in names for figure in LOWER_IS_BETTER]
    if name not in known:
        some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise ConfigError(f"--best-by {name} is no figure here; expected {some}.{did_you_mean(name, known)}")


def badness(figures: Mapping[str, Any], name: str) -> float:
    """A figure turned so that lower is better, NaN worst; `name` is one that `check_figure` lets through.

    Args:
        figures: an evaluation as JSON values.
        name: a figure, SUBSET.FIGURE, or SET.FIGURE of a named set.
    """
    subset, _, figure = name.rpartition(".")
    row: Mapping[str, Any] | None = figures
    if subset and "subsets" in figures:  # else it is the only one
        row = next((row for row in figures["subsets"] if row["name"] == subset), None)
    if row is None:  # none of its pairs has rewards
        return math.inf
    value = float(row[figure]) if LOWER_IS_BETTER[figure] else -float(row[figure])
    return math.inf if math.isnan(value) else value
