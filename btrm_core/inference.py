"""Rewards of many pairs from a model that is in use, on the same rows as in training, by all processes together.

Shapes: P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from btrm_core.distributed import Runtime
from btrm_core.encoded import EncodedPairs
from btrm_core.loader import RowForm, build_micro_batch
from btrm_core.planner import Plan, plan, plan_padded

CHUNK = 512
"""Pairs that are planned together: enough to balance the rows, few enough to plan at once."""


def make_plan(
    pairs: EncodedPairs, form: RowForm, *, pairs_per_step: int, tokens_per_batch: int, world: int, seed: int, epoch: int
) -> Plan:
    """The plan of one epoch over `pairs`, for rows of the given form."""
    lengths = (pairs.shared_P, pairs.chosen_P, pairs.rejected_P)
    if form.layout == "padded":
        return plan_padded(
            *lengths,
            pairs_per_step=pairs_per_step,
            tokens_per_batch=tokens_per_batch,
            world=world,
            seed=seed,
            epoch=epoch,
            multiple_of=form.multiple_of,
        )
    return plan(
        *lengths,
        pairs_per_step=pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        world=world,
        seed=seed,
        epoch=epoch,
        multiple_of=form.multiple_of,
        share_prefix=form.layout == "shared",
    )


def pair_rewards(
    model: Any, pairs: EncodedPairs, runtime: Runtime, form: RowForm, *, tokens_per_batch: int
) -> np.ndarray:
    """Rewards (chosen, rejected) of all pairs, (P, 2) float64, equal on every process.

    Every process runs the same number of forward passes, as ZeRO-3 needs.
    """
    rewards_P2, _ = _rewards(model, pairs, runtime, form, tokens_per_batch, CHUNK, None)
    return rewards_P2


def some_rewards(
    model: Any, pairs: EncodedPairs, runtime: Runtime, form: RowForm, *, tokens_per_batch: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of `count` pairs of a seeded order: which pairs, and their rewards (count, 2), as in `pair_rewards`."""
    rewards_P2, ids = _rewards(model, pairs, runtime, form, tokens_per_batch, count, 1)
    return ids, rewards_P2[ids]


@torch.no_grad()
def _rewards(
    model: Any,
    pairs: EncodedPairs,
    runtime: Runtime,
    form: RowForm,
    tokens_per_batch: int,
    chunk: int,
    steps: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    size = min(chunk, len(pairs))
    made = make_plan(
        pairs, form, pairs_per_step=size, tokens_per_batch=tokens_per_batch, world=runtime.world, seed=0, epoch=0
    )
    rewards_P2 = torch.zeros((len(pairs), 2), dtype=torch.float64, device=runtime.device)
    seen = []
    was_training = model.training
    model.eval()
    for index in range(steps or made.num_steps):
        step = made.step(index)
        seen.append(step.pair_ids)
        for pair_ids in step.rows[runtime.rank]:
            micro = build_micro_batch(pairs, pair_ids, form).to(runtime.device)
            rewards_S = model(micro.batch)
            if len(pair_ids):
                rewards_P2[torch.as_tensor(pair_ids, device=runtime.device)] = rewards_S.view(-1, 2).double()
    model.train(was_training)
    return np.asarray(runtime.sum(rewards_P2).cpu().numpy()), np.concatenate(seen)
