"""Rewards of pairs turned into an evaluation: accuracy with its error, the length baseline beside it, each subset.

Shapes: P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from btrm_core.encoded import EncodedPairs
from btrm_core.errors import DataError
from btrm_core.loss import bradley_terry
from btrm_core.metrics import PairSums, by_subset, named, standard_error, summarise


def figures_of(pairs: EncodedPairs, rewards_P2: np.ndarray) -> dict[str, Any]:
    """Evaluate the rewards of `pairs`; plain Bradley-Terry loss, equal rewards counted half and reported.

    `longer_wins` is the accuracy of always preferring the conversation with more tokens, on the same pairs. Pairs whose
    answers the data calls equally good decide nothing: they are left out and counted as `undecided`.

    Raises:
        DataError: all pairs are of that kind.
    """
    decided_P = pairs.probability_P > 0.5
    if not decided_P.any():
        raise DataError(
            "every evaluation pair is a tie (probability 0.5); expected pairs of which one answer is better"
        )
    rewards = torch.from_numpy(rewards_P2[decided_P])
    sums = PairSums()
    weight_P = torch.ones(len(rewards))
    sums.add_pairs(rewards[:, 0], rewards[:, 1], bradley_terry(rewards[:, 0], rewards[:, 1]), weight_P)
    out: dict[str, Any] = summarise(named(sums.vector()))
    out["accuracy_standard_error"] = standard_error(out["accuracy"], len(rewards))
    longer = (pairs.chosen_P.astype(np.int64) - pairs.rejected_P.astype(np.int64))[decided_P]
    out["longer_wins"] = float(((longer > 0) + 0.5 * (longer == 0)).mean())
    if not decided_P.all():
        out["undecided"] = int((~decided_P).sum())
    names = [pairs.subset(int(i)) for i in np.flatnonzero(decided_P)]
    if len(set(names)) > 1:
        margin_P = (rewards[:, 0] - rewards[:, 1]).numpy()
        out["subsets"] = [vars(row) for row in by_subset(names, margin_P)]
    return out
