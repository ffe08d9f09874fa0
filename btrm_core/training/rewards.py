"""Rewards of many pairs from a model that is in use, on the same rows as in training, by all processes together.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from btrm_core.console import LongWork
from btrm_core.data import TokenStore
from btrm_core.packing import RowForm, StepBudget, plan_epoch
from btrm_core.training.micro_batches import build_micro_batch
from btrm_core.training.processes import Runtime

ASK_EVERY = 16
"""Rows between two questions whether a process was asked to stop: seconds, also of a large model."""


CHUNK = 512
"""Pairs that are planned together: enough to balance the rows, few enough to plan at once."""


class AskedToStop(Exception):
    """A process was asked to stop while rewards were computed; raised on all of them, after the same row."""


def pair_rewards(
    model: Any,
    pairs: TokenStore,
    runtime: Runtime,
    form: RowForm,
    *,
    tokens_per_batch: int,
    stop: Callable[[], bool] = bool,
) -> np.ndarray:
    """Rewards (chosen, rejected) of all pairs, (P, 2) float64, equal on every process.

    Every process runs the same number of forward passes, as ZeRO-3 needs.

    Args:
        model: The reward model or its engine; it is set to evaluation, and back to what it was.
        pairs: The encoded pairs.
        runtime: This process; all take part.
        form: How rows are laid out.
        tokens_per_batch: The token budget of a process.
        stop: Whether this process was asked to stop.

    Raises:
        AskedToStop: one of them was; nothing of what was computed is kept.
    """
    rewards_P2, _ = _rewards(model, pairs, runtime, form, tokens_per_batch, None, stop)
    return rewards_P2


def some_rewards(
    model: Any, pairs: TokenStore, runtime: Runtime, form: RowForm, *, tokens_per_batch: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of some pairs of a seeded order: which pairs, and their rewards [N, 2], as in `pair_rewards`.

    Args:
        model: As in `pair_rewards`.
        pairs: What is chosen from.
        runtime: This process; all take part.
        form: How rows are laid out.
        tokens_per_batch: The token budget of a process.
        count: How many; pairs that stay together in a step count as one, and fewer are given if there are fewer.

    Returns:
        Indices of the pairs in `pairs`, int64 [N], and their rewards, chosen then rejected, float64 [N, 2].
    """
    rewards_P2, ids = _rewards(model, pairs, runtime, form, tokens_per_batch, count)
    return ids, rewards_P2[ids]


@torch.no_grad()
def _rewards(
    model: Any,
    pairs: TokenStore,
    runtime: Runtime,
    form: RowForm,
    tokens_per_batch: int,
    count: int | None,
    stop: Callable[[], bool] = bool,
) -> tuple[np.ndarray, np.ndarray]:
    size = min(count or CHUNK, pairs.places.num_units)
    row_tokens = tokens_per_batch * (runtime.world // runtime.ranks)
    made = plan_epoch(pairs.places, form, StepBudget(size, row_tokens, runtime.ranks))
    found: list[torch.Tensor] = []
    own: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    was_training, asked = model.training, 0
    model.eval()
    what, of = ("evaluating", len(pairs)) if count is None else ("computing rewards", None)
    with LongWork(what, of, "pair") as work:
        for index in range(1 if count else made.num_steps):
            step = made.step(index)
            rows = step.rows[runtime.row_rank]
            for number, row in enumerate(rows, start=1):
                if count is None and asked % ASK_EVERY == 0 and runtime.any(stop()):
                    model.train(was_training)
                    raise AskedToStop
                asked += 1
                micro = build_micro_batch(pairs, row, form).sent_to(runtime.device)
                sides_P2 = torch.stack(micro.sides(model(micro.batch)), dim=1).double()
                if len(micro.pair_ids_P) and runtime.counts:
                    own.append(micro.pair_ids_P)
                    found.append(sides_P2)
                work.reach(sum(map(len, seen)) + len(step.pair_ids) * number // len(rows))
            seen.append(step.pair_ids)
    model.train(was_training)
    rewards_P2 = torch.zeros((len(pairs), 2), dtype=torch.float64, device=runtime.device)
    if found:
        places_P = torch.from_numpy(np.concatenate(own)).to(runtime.device)
        rewards_P2.index_copy_(0, places_P, torch.cat(found))
    return np.asarray(runtime.sum(rewards_P2).cpu().numpy()), np.concatenate(seen)
