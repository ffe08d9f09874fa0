"""From a plan to the micro-batches of each step, built ahead of the step that needs them.

Decides: how the pairs of a row become tensors, on which workers, in which order. The order is the plan's alone, so
resuming at step n means starting to read at step n.

Shapes: P pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from btrm_core.attention import PADDED, collate, row_multiple
from btrm_core.encoded import EncodedPairs
from btrm_core.packing import Batch
from btrm_core.planner import Plan


@dataclass(frozen=True)
class RowForm:
    """How the pairs of a micro-batch are laid out: shared or packed rows for a kernel, or padded lines."""

    layout: str
    kernel: str
    multiple_of: int
    pad_id: int


def row_form(layout: str, kernel: str, device_type: str, pad_id: int) -> RowForm:
    """The form of a layout ("shared", "packed", "padded") for a model's kernel on a device."""
    kernel = PADDED if layout == "padded" else kernel
    return RowForm(layout, kernel, row_multiple(kernel, device_type), pad_id)


@dataclass
class MicroBatch:
    """What one process computes at once. A dummy keeps the processes in step and counts for nothing."""

    batch: Batch
    weight_P: Tensor
    margin_P: Tensor
    pair_ids_P: np.ndarray

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`; without waiting where the memory is pinned."""
        weight_P = self.weight_P.to(device, non_blocking=True)
        margin_P = self.margin_P.to(device, non_blocking=True)
        return MicroBatch(self.batch.to(device, non_blocking=True), weight_P, margin_P, self.pair_ids_P)

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory; `DataLoader` calls this."""
        return MicroBatch(
            self.batch.pin_memory(), self.weight_P.pin_memory(), self.margin_P.pin_memory(), self.pair_ids_P
        )


@dataclass
class StepBatches:
    """One optimiser step of one process."""

    index: int
    micro_batches: list[MicroBatch]
    total_weight: float
    """Sum of the weights of the step's pairs over all processes (their number, when every weight is 1)."""
    rank_imbalance: float
    """Cost of the busiest process over the mean."""

    def pin_memory(self) -> StepBatches:
        """The same step in page-locked memory; `DataLoader` calls this."""
        pinned = [micro.pin_memory() for micro in self.micro_batches]
        return StepBatches(self.index, pinned, self.total_weight, self.rank_imbalance)


class _Steps(IterableDataset[StepBatches]):
    """The steps from `first` to `last`; worker w of n builds every n-th, so that their order is kept."""

    def __init__(self, pairs: EncodedPairs, plans: Sequence[Plan], rank: int, form: RowForm, first: int, last: int):
        self.pairs, self.plans, self.rank, self.form = pairs, plans, rank, form
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[StepBatches]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(self.first + offset, self.last, stride):
            yield self.build(index)

    def build(self, index: int) -> StepBatches:
        steps_per_epoch = self.plans[0].num_steps
        step = self.plans[index // steps_per_epoch].step(index % steps_per_epoch)
        return StepBatches(
            index=index,
            micro_batches=[build_micro_batch(self.pairs, row, self.form) for row in step.rows[self.rank]],
            total_weight=float(self.pairs.weight_P[step.pair_ids].sum(dtype=np.float64)),
            rank_imbalance=step.imbalance,
        )


def build_micro_batch(pairs: EncodedPairs, pair_ids: np.ndarray, form: RowForm) -> MicroBatch:
    """Lay the given pairs out as one row (or padded lines) with their weights and margins.

    An empty list of pairs gives a dummy: the first pair with weight 0, so that every process runs the same number of
    forward and backward passes.
    """
    used = pair_ids if len(pair_ids) else np.zeros(1, dtype=np.int64)
    weight_P = pairs.weight_P[used] if len(pair_ids) else np.zeros(1, dtype=np.float32)
    batch = collate(
        [pairs.group(int(i)) for i in used],
        kernel=form.kernel,
        share_prefix=form.layout == "shared",
        multiple_of=form.multiple_of,
        pad_id=form.pad_id,
    )
    return MicroBatch(
        batch=batch,
        weight_P=torch.from_numpy(weight_P.astype(np.float32)),
        margin_P=torch.from_numpy(pairs.margin_P[used].astype(np.float32)),
        pair_ids_P=pair_ids,
    )


def steps(
    pairs: EncodedPairs, plans: Sequence[Plan], *, rank: int, form: RowForm, first: int, last: int, workers: int
) -> Iterator[StepBatches]:
    """The steps `first` to `last` (exclusive) of this process, built by `workers` processes ahead of their use."""
    source = _Steps(pairs, plans, rank, form, first, last)
    if workers == 0 or last - first < 2:
        yield from source
        return
    pinned = torch.cuda.is_available()
    yield from DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=2, pin_memory=pinned)
