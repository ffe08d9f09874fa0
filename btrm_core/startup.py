"""Checks before the first step, on a few real pairs: they cost a forward pass and save a day.

Decides: whether packed rows may be used at all, and whether a fresh head gives the loss it must. Anything that is off
ends the run with the reason, or, for packing, falls back to padded batches.

Shapes: P pairs.
"""

from __future__ import annotations

import math

import numpy as np

from btrm_core.errors import TrainingError

LN2 = math.log(2.0)


def expected_first_loss(margin_P: np.ndarray) -> tuple[float, float]:
    """The loss a random head should start with, and how far off it may be.

    A head that knows nothing orders pairs at random, so the mean loss is ln 2 plus the curvature of -log sigmoid at 0
    times the variance of the reward margin: ln 2 + var / 8. The margins of one head share its direction, hence their
    mean may be off by about their spread; more than that is not explained.

    >>> import numpy as np
    >>> expected, slack = expected_first_loss(np.array([-0.4, 0.4, -0.4, 0.4]))
    >>> round(expected - 0.6931, 3)
    0.02
    """
    variance = float(np.var(margin_P))
    return LN2 + variance / 8, 0.05 + 0.75 * math.sqrt(variance) + variance / 4


def check_first_loss(rewards_P2: np.ndarray, ids: list[str]) -> float:
    """Return the step-0 loss of a fresh head, or stop if its distance from ln 2 is not explained.

    Raises:
        TrainingError: a reward is not finite, all margins are zero, or the loss is too far from ln 2.
    """
    bad = ~np.isfinite(rewards_P2).all(axis=1)
    if bad.any():
        some = ", ".join(ids[i] for i in np.flatnonzero(bad)[:3])
        raise TrainingError(
            f"{int(bad.sum())} of {len(bad)} pairs have a reward that is not finite before training (first: {some}); "
            "the base model's weights or the attention kernel are broken; try --attention eager"
        )
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    if len(margin_P) > 1 and not margin_P.any():
        raise TrainingError(
            "chosen and rejected get the same reward in every pair before training, so there is nothing to learn from; "
            "the reward is read where both sides are still equal (is the chat template cut off?)"
        )
    loss = float(np.logaddexp(0.0, -margin_P).mean())
    expected, slack = expected_first_loss(margin_P)
    if abs(loss - expected) > slack:
        raise TrainingError(
            f"the first loss is {loss:.3f}, but an untrained head on these pairs must give {expected:.3f} ± "
            f"{slack:.3f} (ln 2 + variance of the reward margin / 8); reward margin {margin_P.mean():+.3f} ± "
            f"{margin_P.std():.3f}: one side's tokens leak into the other, or the sides are told apart by position"
        )
    return loss
