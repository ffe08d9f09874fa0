"""From a plan to the micro-batches of each step, built ahead of the step that needs them.

Decides: how the pairs of a row become tensors, on which workers, in which order. The order is the plan's alone, so
resuming at step n means starting to read at step n.

Shapes: P pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from btrm_core.encoded import EncodedPairs
from btrm_core.packing import Batch, pack_row, pad_rows
from btrm_core.planner import Plan


@dataclass
class MicroBatch:
    """What one process computes at once. A dummy keeps the processes in step and counts for nothing."""

    batch: Batch
    weight_P: Tensor
    margin_P: Tensor
    pair_ids_P: np.ndarray
    separate_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        move = {"device": device, "non_blocking": True}
        return MicroBatch(
            self.batch.to(device),
            self.weight_P.to(**move),
            self.margin_P.to(**move),
            self.pair_ids_P,
            self.separate_tokens,
        )


@dataclass
class StepBatches:
    """One optimiser step of one process."""

    index: int
    micro_batches: list[MicroBatch]
    total_weight: float
    """Sum of the weights of the step's pairs over all processes (their number, when every weight is 1)."""
    rank_imbalance: float
    """Largest number of tokens of a process over the mean."""


class _Steps(IterableDataset[StepBatches]):
    """The steps from `first` to `last`; worker w of n builds every n-th, so that their order is kept."""

    def __init__(
        self, pairs: EncodedPairs, plans: list[Plan], rank: int, layout: str, pad_id: int, first: int, last: int
    ):
        self.pairs, self.plans, self.rank, self.layout, self.pad_id = pairs, plans, rank, layout, pad_id
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[StepBatches]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(self.first + offset, self.last, stride):
            yield self.build(index)

    def build(self, index: int) -> StepBatches:
        steps_per_epoch = self.plans[0].num_steps
        step = self.plans[index // steps_per_epoch].step(index % steps_per_epoch)
        tokens = [sum(self.pairs.row_tokens(row, self.layout) for row in rows) for rows in step.rows]
        return StepBatches(
            index=index,
            micro_batches=[
                build_micro_batch(self.pairs, row, self.layout, self.pad_id) for row in step.rows[self.rank]
            ],
            total_weight=float(self.pairs.weight_P[step.pair_ids].sum()),
            rank_imbalance=max(tokens) * len(tokens) / max(1, sum(tokens)),
        )


def build_micro_batch(pairs: EncodedPairs, pair_ids: np.ndarray, layout: str, pad_id: int) -> MicroBatch:
    """Lay the given pairs out as one row (or padded lines) with their weights and margins.

    An empty list of pairs gives a dummy: the first pair with weight 0, so that every process runs the same number of
    forward and backward passes.
    """
    weight = pairs.weight_P[pair_ids] if len(pair_ids) else np.zeros(1, dtype=np.float32)
    used = pair_ids if len(pair_ids) else np.zeros(1, dtype=np.int64)
    groups = [pairs.group(int(i)) for i in used]
    if layout == "padded":
        batch = pad_rows(groups, pad_id=pad_id)
    else:
        batch = pack_row(groups, share_prefix=layout == "shared", pad_id=pad_id)
    return MicroBatch(
        batch=batch,
        weight_P=torch.from_numpy(np.asarray(weight, dtype=np.float32)),
        margin_P=torch.from_numpy(np.asarray(pairs.margin_P[used], dtype=np.float32)),
        pair_ids_P=pair_ids,
        separate_tokens=sum(sum(group.tails) + len(group.tails) * group.shared for group in groups)
        if len(pair_ids)
        else 0,
    )


def steps(
    pairs: EncodedPairs, plans: list[Plan], *, rank: int, layout: str, pad_id: int, first: int, last: int, workers: int
) -> Iterator[StepBatches]:
    """The steps `first` to `last` (exclusive) of this process, built by `workers` processes ahead of their use."""
    source = _Steps(pairs, plans, rank, layout, pad_id, first, last)
    if workers == 0 or last - first < 2:
        yield from source
        return
    yield from DataLoader(
        source, batch_size=None, num_workers=workers, prefetch_factor=2, pin_memory=torch.cuda.is_available()
    )
