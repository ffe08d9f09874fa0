"""Training and evaluation pairs kept apart: no prompt is on both sides.

Shapes: P pairs, G prompts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from btrm_core.data.issues import PROMPT_IN_EVALUATION, IssueReport, RowIssue
from btrm_core.data.pairs import PairData
from btrm_core.errors import DataError


def split_held_out(data: PairData, fraction: float) -> tuple[PairData, PairData]:
    """Split into (train, held out) so that no prompt is on both sides.

    The prompts with the smallest hashes are held out, until they hold about `fraction` of the pairs. The choice
    depends on the prompts alone: not on the order of the rows, not on a seed. Of at least two prompts, each side
    gets at least one; a single prompt stays in train.

    Args:
        data: the pairs to split.
        fraction: wanted share of the held-out pairs, at least 0 (nothing is held out) and below 1.

    Returns:
        Both parts, in the order of the data; the report of the rows stays with the first.

    Raises:
        DataError: the fraction is out of range.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction is {fraction}, expected at least 0 and below 1.")
    prompts_G, group_P, pairs_G = np.unique(data.prompt_hash_P, return_inverse=True, return_counts=True)
    number = 0  # of prompts held out: np.unique has sorted them by hash
    if fraction > 0 and len(prompts_G) > 1:
        held_G = np.cumsum(pairs_G)
        number = int(np.argmin(np.abs(held_G - fraction * len(data)))) + 1
        number = min(max(number, 1), len(prompts_G) - 1)
    is_held_P = group_P < number
    train = data.select(np.flatnonzero(~is_held_P), f"train without {number} prompts", data.issues)
    held = data.select(np.flatnonzero(is_held_P), f"held out {number} prompts", IssueReport())
    return train, replace(held, issues=IssueReport(rows=len(held), pairs=len(held)))


def drop_overlap(train: PairData, evaluation: PairData) -> tuple[PairData, int]:
    """Return `train` without the pairs whose prompt is also in `evaluation`, and how many those are.

    They are counted in the report of the pairs returned.

    Args:
        train: the pairs to train on.
        evaluation: the pairs to evaluate on.

    Raises:
        DataError: every training prompt is in the evaluation data.
    """
    shared_P = np.isin(train.prompt_hash_P, evaluation.prompt_hash_P)
    number = int(shared_P.sum())
    if not number:
        return train, 0
    if number == len(train):
        raise DataError(
            f"all {number:,} training pairs have a prompt that is also in the evaluation data. "
            "Give other evaluation data, or none to hold out a part of the training data."
        )
    ids = [str(train.dataset[int(i)]["id"]) for i in np.flatnonzero(shared_P)[:5]]
    examples = [RowIssue(name, 0, PROMPT_IN_EVALUATION, PROMPT_IN_EVALUATION, bad=False) for name in ids]
    issues = train.issues.skip(PROMPT_IN_EVALUATION, number, examples)
    return train.select(np.flatnonzero(~shared_P), f"without the prompts of {evaluation.fingerprint}", issues), number
