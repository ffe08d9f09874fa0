"""From a plan to the micro-batches of each step, built ahead of the step that needs them.

Decides: how the pairs of a row become tensors, on which workers, in which order. The order is the plan's alone, so
resuming at step n means starting to read at step n.

Shapes: P pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from btrm_core.data import TokenStore
from btrm_core.packing import Batch, EpochPlan, collate

if TYPE_CHECKING:
    from btrm_core.packing import RowForm


@dataclass
class MicroBatch:
    """What one process computes at once. A dummy keeps the processes in step and counts for nothing.

    Attributes:
        batch: the row, with S sequences.
        chosen_P: where the reward of each pair's chosen sequence is among the S.
        rejected_P: likewise of the rejected one.
        weight_P: the pair's weight in the loss.
        margin_P: the data's margin.
        probability_P: how likely it is that chosen is the better one.
        group_S: the group of each sequence, counted within the micro-batch.
        wins_S: how many sequences of its group each one beats, for losses over whole rankings.
        pair_ids_P: which pairs these are; none for a dummy.
    """

    batch: Batch
    chosen_P: Tensor
    rejected_P: Tensor
    weight_P: Tensor
    margin_P: Tensor
    probability_P: Tensor
    group_S: Tensor
    wins_S: Tensor
    pair_ids_P: np.ndarray

    def sides(self, rewards_S: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards of the chosen and of the rejected sequence of every pair."""
        return rewards_S.index_select(0, self.chosen_P), rewards_S.index_select(0, self.rejected_P)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`; without waiting where the memory is pinned."""
        return self._moved(
            self.batch.to(device, non_blocking=True), lambda tensor: tensor.to(device, non_blocking=True)
        )

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in page-locked memory; `DataLoader` calls this."""
        return self._moved(self.batch.pin_memory(), lambda tensor: tensor.pin_memory())

    def _moved(self, batch: Batch, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        tensors: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, batch=batch, **tensors)


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

    def __init__(self, pairs: TokenStore, plans: Sequence[EpochPlan], rank: int, form: RowForm, first: int, last: int):
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
            total_weight=float(self.pairs.groups.weight_G[step.pair_ids].sum()),
            rank_imbalance=step.imbalance,
        )


def build_micro_batch(pairs: TokenStore, row: np.ndarray, form: RowForm) -> MicroBatch:
    """Lay the groups of a row out, packed or as padded lines, with the weights, margins and labels of their pairs.

    An empty row gives a dummy: the first group with weight 0, so that every process runs the same number of forward
    and backward passes.
    """
    groups = [pairs.groups.group(int(i)) for i in (row if len(row) else [0])]
    sizes = [len(group.tokens.leaf) for group in groups]
    offsets = np.repeat(np.cumsum([0, *sizes[:-1]]), [len(group.pair_ids_P) for group in groups])
    ids_P = np.concatenate([group.pair_ids_P for group in groups])
    batch = collate(
        [group.tokens for group in groups],
        kernel=form.kernel,
        share_prefix=form.layout == "shared",
        multiple_of=form.multiple_of,
        pad_id=form.pad_id,
    )
    return MicroBatch(
        batch=batch,
        chosen_P=torch.from_numpy(offsets + np.concatenate([group.chosen_P for group in groups])),
        rejected_P=torch.from_numpy(offsets + np.concatenate([group.rejected_P for group in groups])),
        weight_P=torch.from_numpy(pairs.weight_P[ids_P] if len(row) else np.zeros(len(ids_P), np.float32)),
        margin_P=torch.from_numpy(pairs.margin_P[ids_P]),
        probability_P=torch.from_numpy(pairs.probability_P[ids_P]),
        group_S=torch.from_numpy(np.repeat(np.arange(len(groups)), sizes)),
        wins_S=torch.from_numpy(np.concatenate([group.wins_S for group in groups])),
        pair_ids_P=ids_P if len(row) else ids_P[:0],
    )


def steps(
    pairs: TokenStore, plans: Sequence[EpochPlan], *, rank: int, form: RowForm, first: int, last: int, workers: int
) -> Iterator[StepBatches]:
    """The steps `first` to `last` (exclusive) of this process, built by `workers` processes ahead of their use."""
    source = _Steps(pairs, plans, rank, form, first, last)
    if workers == 0 or last - first < 2:
        yield from source
        return
    pinned = torch.cuda.is_available()
    yield from DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=2, pin_memory=pinned)
