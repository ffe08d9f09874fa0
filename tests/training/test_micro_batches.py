"""Steps from loader workers: the same as without, in order, and no descriptor for every tensor."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from btrm_core.data.store import TokenStore
from btrm_core.packing.batch import Batch
from btrm_core.packing.forms import RowForm
from btrm_core.packing.steps import EpochPlan, StepBudget, plan_epoch
from btrm_core.training.micro_batches import MicroBatch, StepBatches, build_micro_batch, steps, to_bytes

FORM = RowForm("shared", "varlen", 8, 0)


def store(groups: int = 60) -> TokenStore:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(groups):
        prompt = rng.integers(3, 60, 12).tolist()
        sequences = [[*prompt, 60 + n, *rng.integers(3, 60, 5).tolist()] for n in range(4)]
        made.append((sequences, [(0, 1), (0, 2), (2, 3)]))
    return TokenStore.of_ids(made)


def planned(pairs: TokenStore, budget: int = 60, group_by: str = "prompt") -> EpochPlan:
    return plan_epoch(pairs.places, FORM, StepBudget(45, budget, group_by=group_by))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, StepBatches | MicroBatch | Batch) or hasattr(value, "runs"):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def test_a_step_through_bytes_is_the_same() -> None:
    pairs = store(4)
    (step,) = steps(pairs, [planned(pairs)], rank=0, form=FORM, first=0, last=1, workers=0)
    again: StepBatches = pickle.loads(to_bytes(step))
    ours, theirs = list(tensors(step)), list(tensors(again))
    assert len(ours) == len(theirs) > 15 * len(step.micro_batches)
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    assert (again.index, again.total_weight) == (step.index, step.total_weight)


@pytest.mark.distributed
def test_workers_send_no_descriptor_for_a_tensor() -> None:
    """Steps of dozens of micro-batches under a limit that one step's tensors would exceed many times."""
    pairs = store()
    made = planned(pairs)
    alone = list(steps(pairs, [made], rank=0, form=FORM, first=0, last=4, workers=0))
    count = sum(1 for _ in tensors(alone[0]))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 200
    assert count > limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        found = list(steps(pairs, [made], rank=0, form=FORM, first=0, last=4, workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [step.index for step in found] == [0, 1, 2, 3]
    for left, right in zip(alone, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))


def test_useful_tokens_are_those_of_the_pairs() -> None:
    """A conversation of two pairs is computed once and counts for both: what separate passes of the pairs compute."""
    pairs = store(1)
    micro = build_micro_batch(pairs, np.array([0, 1, 2]), RowForm("shared", "varlen", 1, 0))
    assert micro.batch.useful == pairs.lengths_P2.sum() == 6 * 18
    assert micro.batch.computed == 12 + 4 * 6
    assert micro.batch.shared == micro.batch.useful - micro.batch.computed
    part = build_micro_batch(pairs, np.array([2]), RowForm("shared", "varlen", 1, 0))
    assert part.batch.computed == 12 + 2 * 6, "conversations that the pairs of a row do not compare are not computed"
    padded = build_micro_batch(pairs, np.array([0, 1, 2]), RowForm("padded", "padded", 1, 0))
    assert padded.batch.computed + padded.batch.shared == padded.batch.useful


def test_a_dummy_counts_for_nothing() -> None:
    pairs = store(2)
    micro = build_micro_batch(pairs, np.zeros(0, np.int64), FORM)
    assert micro.weight_P.tolist() == [0]
    assert micro.pair_ids_P.tolist() == []
    assert micro.batch.computed > 0
