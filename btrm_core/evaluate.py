"""Rewards of pairs turned into an evaluation: accuracy with its error, the length baseline beside it, each subset.

Shapes: P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from btrm_core.encoded import EncodedPairs
from btrm_core.loss import bradley_terry
from btrm_core.metrics import PairSums, by_subset, named, standard_error, summarise


def figures_of(pairs: EncodedPairs, rewards_P2: np.ndarray) -> dict[str, Any]:
    """Evaluate the rewards of `pairs`; plain Bradley-Terry loss, ties counted half and reported.

    `longer_wins` is the accuracy of always preferring the conversation with more tokens, on the same pairs.
    """
    rewards = torch.from_numpy(rewards_P2)
    sums = PairSums()
    weight_P = torch.ones(len(rewards))
    sums.add_pairs(rewards[:, 0], rewards[:, 1], bradley_terry(rewards[:, 0], rewards[:, 1]), weight_P)
    out: dict[str, Any] = summarise(named(sums.vector()))
    out["accuracy_standard_error"] = standard_error(out["accuracy"], len(rewards))
    longer = pairs.chosen_P.astype(np.int64) - pairs.rejected_P.astype(np.int64)
    out["longer_wins"] = float(((longer > 0) + 0.5 * (longer == 0)).mean())
    names = [pairs.subset(i) for i in range(len(pairs))]
    if len(set(names)) > 1:
        out["subsets"] = [vars(row) for row in by_subset(names, rewards_P2[:, 0] - rewards_P2[:, 1])]
    return out
