"""Two models on the same pairs: is one better, and could this data have shown it?

Decides: pairs are matched by id and prompt; a difference is shown only where McNemar's test and the resampled interval
both say so; of several subsets, p values are corrected (Holm).

Shapes: P pairs that both models were judged on.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import DataError
from btrm_core.evaluation.assess import judged_places
from btrm_core.evaluation.scores import PairRewards, same_pairs
from btrm_core.evaluation.statistics import (
    LEVEL,
    Interval,
    bootstrap_means,
    clusters,
    correlation,
    holm,
    percentiles,
    wilson,
    wins,
    z_value,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

POWER = 0.8
KEPT = 100


@dataclass(frozen=True)
class Difference:
    """Accuracy of two models on the same pairs.

    Attributes:
        name: the subset; empty for all pairs.
        pairs: how many.
        first: accuracy of the first model, ties half.
        second: accuracy of the second model.
        difference: first minus second.
        interval: of the difference, resampled by prompt; None for a single prompt.
        only_first: pairs that only the first model gets right (a tie is not right).
        only_second: pairs that only the second one gets right.
        p_value: McNemar's exact test, two-sided; the chance of so uneven a split if both models were equally good.
        p_corrected: the same, corrected for the number of subsets (Holm); equal to `p_value` for all pairs.
        shown: whether the data shows a difference: corrected p below 0.05, and 0 outside the interval.
        smallest_detectable: the smallest true difference that would have been shown with a chance of 80 %, at the
            share of pairs on which the models differ here.
    """

    name: str
    pairs: int
    first: float
    second: float
    difference: float
    interval: Interval | None
    only_first: int
    only_second: int
    p_value: float
    p_corrected: float
    shown: bool
    smallest_detectable: float

    @property
    def verdict(self) -> str:
        """What may be said of it, in words."""
        if not self.shown:
            return "no difference shown"
        return "the first model is better" if self.difference > 0 else "the second model is better"


@dataclass(frozen=True)
class Disagreement:
    """A pair that the models order differently; margins in standard deviations of each model's margins."""

    first_place: int
    second_place: int
    id: str
    subset: str
    first_margin: float
    second_margin: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the pairs that both were judged on.

    Attributes:
        first: the first model.
        second: the second model.
        only_in_first: pairs left out, because the second model has no reward for them.
        only_in_second: likewise.
        by_id: whether only their ids say that the pairs are the same, because no prompt is known to be in both.
        overall: all pairs together.
        subsets: every named part by itself; empty for a single one.
        agreement: share of pairs that both order alike (a tie agrees with a tie only).
        kappa: Cohen's, agreement beyond chance; None where both always give the same answer.
        margin_correlation: Spearman's, of the reward margins; None where one side does not vary.
        disagreements: pairs ordered differently, the largest gap first; at most 100.
    """

    first: str
    second: str
    only_in_first: int
    only_in_second: int
    by_id: bool
    overall: Difference
    subsets: tuple[Difference, ...]
    agreement: float
    kappa: float | None
    margin_correlation: float | None
    disagreements: tuple[Disagreement, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values, with the verdicts in words."""
        out = asdict(self)
        out["overall"]["verdict"] = self.overall.verdict
        for row, part in zip(out["subsets"], self.subsets, strict=True):
            row["verdict"] = part.verdict
        return out


def compare(first: PairRewards, second: PairRewards) -> Comparison:
    """Compare two models on the pairs that both have rewards for.

    Args:
        first: one model's rewards, with the pairs' ids.
        second: the other's, in any order; differences are first minus second.

    Raises:
        DataError: they share no pair that can be judged.
    """
    first_places, second_places, by_id = matched(first, second)
    left, right = first.select(first_places), second.select(second_places)
    prompt_P = clusters(left.prompt_P, len(left))
    margins = left.margin_P, right.margin_P
    label_P = np.array(left.subset_P, dtype=object)
    names = sorted(set(left.subset_P))
    parts = [
        difference(name, margins[0][label_P == name], margins[1][label_P == name], prompt_P[label_P == name])
        for name in names
    ]
    sign_P2 = np.sign(np.stack(margins, axis=1))
    return Comparison(
        first=first.model,
        second=second.model,
        only_in_first=len(first) - len(first_places),
        only_in_second=len(second) - len(second_places),
        by_id=by_id,
        overall=difference("", *margins, prompt_P),
        subsets=_corrected(parts) if len(parts) > 1 else (),
        agreement=float((sign_P2[:, 0] == sign_P2[:, 1]).mean()),
        kappa=kappa(sign_P2[:, 0], sign_P2[:, 1]),
        margin_correlation=correlation(*margins, ranks=True),
        disagreements=_disagreements(left, right, (first_places, second_places)),
    )


def matched(first: PairRewards, second: PairRewards) -> tuple[IntArray, IntArray, bool]:
    """Places of the pairs that both models can be judged on.

    Args:
        first: one model's rewards.
        second: the other's.

    Returns:
        Places in `first` and in `second`, int64 [P] each; and whether only the ids say that these are the same pairs.

    Raises:
        DataError: there is none.
    """
    of_first, of_second, by_id = same_pairs(first, second)
    both = np.isin(of_first, judged_places(first)[0]) & np.isin(of_second, judged_places(second)[0])
    if not both.any():
        why = "no pair has rewards of both" if len(both) else "no id is in both"
        raise DataError(
            f"{first.model} and {second.model} share no pair: {why}; evaluate both models on the same --data"
        )
    return of_first[both], of_second[both], by_id


def difference(name: str, first_P: FloatArray, second_P: FloatArray, prompt_P: IntArray) -> Difference:
    """The difference between two models' accuracies from their reward margins of the same pairs.

    Args:
        name: the subset, "" for all pairs.
        first_P: one model's reward margins [P].
        second_P: the other's [P].
        prompt_P: number of every pair's prompt [P]; the bootstrap draws whole prompts.
    """
    cluster_P = clusters(prompt_P, len(first_P))
    gain_P = wins(first_P) - wins(second_P)
    only_first = int(((first_P > 0) & ~(second_P > 0)).sum())
    only_second = int(((second_P > 0) & ~(first_P > 0)).sum())
    drawn_B = bootstrap_means(gain_P, cluster_P)
    interval = None if drawn_B is None else percentiles(drawn_B)
    p_value = mcnemar(only_first, only_second)
    return Difference(
        name=name,
        pairs=len(first_P),
        first=float(wins(first_P).mean()),
        second=float(wins(second_P).mean()),
        difference=float(gain_P.mean()),
        interval=interval,
        only_first=only_first,
        only_second=only_second,
        p_value=p_value,
        p_corrected=p_value,
        shown=_shown(p_value, interval),
        smallest_detectable=_detectable(gain_P, drawn_B, only_first + only_second),
    )


def _shown(p_value: float, interval: Interval | None) -> bool:
    return p_value < 1 - LEVEL and interval is not None and not interval.low <= 0 <= interval.high


def _corrected(parts: list[Difference]) -> tuple[Difference, ...]:
    p_values = holm([part.p_value for part in parts])
    return tuple(
        Difference(**{**vars(part), "p_corrected": p, "shown": _shown(p, part.interval)})
        for part, p in zip(parts, p_values, strict=True)
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: how likely so uneven a split of the pairs is on which only one model is right.

    Args:
        only_first: pairs that only the first model has right.
        only_second: pairs that only the second has right.

    Returns:
        The two-sided p value; 1 if there are no such pairs.

    Reference:
        McNemar 1947, Note on the sampling error of the difference between correlated proportions or percentages.
    """
    from scipy.stats import binomtest

    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def smallest_detectable(pairs: float, differing: float, power: float = POWER) -> float:
    """The smallest difference between two accuracies on the same pairs that a test would show.

    Args:
        pairs: number of (independent) pairs.
        differing: share of pairs that only one of the models gets right.
        power: chance to show it.

    Returns:
        A difference from 0 to 1; the whole of `differing` where even that would not be shown.

    Reference:
        Connor 1987, Sample size for testing differences in proportions for the paired-sample design.

    >>> round(smallest_detectable(1000, 0.10), 3)
    0.028
    """
    z_level, z_power = z_value(), NormalDist().inv_cdf(power)

    def shown(size: float) -> bool:
        spread = math.sqrt(max(0.0, differing - size * size))
        return size * math.sqrt(pairs) >= z_level * math.sqrt(differing) + z_power * spread

    low, high = 0.0, min(1.0, differing)
    if not shown(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def _detectable(gain_P: FloatArray, drawn_B: FloatArray | None, differing: int) -> float:
    """The smallest detectable difference; pairs of one prompt that go together count as fewer pairs."""
    pairs = len(gain_P)
    share = differing / pairs if differing else wilson(0, pairs).high
    alone = float(gain_P.var()) / pairs
    design = float(drawn_B.var()) / alone if drawn_B is not None and alone > 0 else 1.0
    return smallest_detectable(pairs / max(1.0, design), share)


def kappa(first_P: FloatArray, second_P: FloatArray) -> float | None:
    """Cohen's kappa of two lists of labels; None where chance alone agrees always.

    Args:
        first_P: one rater's labels [P].
        second_P: the other's [P], of the same things.
    """
    labels = np.union1d(first_P, second_P)
    observed = float((first_P == second_P).mean())
    chance = float(sum((first_P == label).mean() * (second_P == label).mean() for label in labels))
    return None if chance >= 1 else (observed - chance) / (1 - chance)


def _disagreements(
    left: PairRewards, right: PairRewards, places: tuple[IntArray, IntArray]
) -> tuple[Disagreement, ...]:
    scaled = [m / scale if (scale := float(m.std())) > 0 else m for m in (left.margin_P, right.margin_P)]
    gap_P = np.abs(scaled[0] - scaled[1])
    differ = np.flatnonzero(np.sign(left.margin_P) != np.sign(right.margin_P))
    order = differ[np.argsort(-gap_P[differ], kind="stable")][:KEPT]
    return tuple(
        Disagreement(
            int(places[0][i]),
            int(places[1][i]),
            left.id_P[i],
            left.subset_P[i],
            float(scaled[0][i]),
            float(scaled[1][i]),
        )
        for i in order
    )
