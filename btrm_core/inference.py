"""Rewards of many pairs from a model that is in use, on the same rows as in training, by all processes together.

Shapes: P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from btrm_core.distributed import Runtime
from btrm_core.encoded import EncodedPairs
from btrm_core.loader import build_micro_batch
from btrm_core.planner import plan, plan_padded

CHUNK = 512
"""Pairs that are planned together: enough to balance the rows, few enough to plan at once."""


def make_plan(
    pairs: EncodedPairs, *, layout: str, pairs_per_step: int, tokens_per_batch: int, world: int, **order: int
) -> Any:
    """The plan of one epoch over `pairs` for a layout; `order` holds seed and epoch."""
    lengths = (pairs.shared_P, pairs.chosen_P, pairs.rejected_P)
    budget: dict[str, Any] = {
        "pairs_per_step": pairs_per_step,
        "tokens_per_batch": tokens_per_batch,
        "world": world,
        **order,
    }
    if layout == "padded":
        return plan_padded(*lengths, **budget)
    return plan(*lengths, share_prefix=layout == "shared", **budget)


@torch.no_grad()
def pair_rewards(
    model: Any,
    pairs: EncodedPairs,
    runtime: Runtime,
    *,
    layout: str,
    tokens_per_batch: int,
    pad_id: int,
    limit: int | None = None,
) -> np.ndarray:
    """Rewards (chosen, rejected) of all pairs, (P, 2) float64, equal on every process.

    Every process runs the same number of forward passes, as ZeRO-3 needs. `limit` takes the first pairs of the seeded
    order only.
    """
    made = make_plan(
        pairs,
        layout=layout,
        pairs_per_step=min(CHUNK, limit or CHUNK),
        tokens_per_batch=tokens_per_batch,
        world=runtime.world,
        seed=0,
        epoch=0,
    )
    rewards_P2 = torch.zeros((len(pairs), 2), dtype=torch.float64, device=runtime.device)
    was_training = model.training
    model.eval()
    for index in range(made.num_steps if limit is None else 1):
        for pair_ids in made.step(index).rows[runtime.rank]:
            micro = build_micro_batch(pairs, pair_ids, layout, pad_id).to(runtime.device)
            rewards_S = model(micro.batch)
            if len(pair_ids):
                rewards_P2[torch.as_tensor(pair_ids, device=runtime.device)] = rewards_S.view(-1, 2).double()
    model.train(was_training)
    return np.asarray(runtime.sum(rewards_P2).cpu().numpy())
