"""From a plan to the micro-batches of each step, built ahead of the step that needs them.

Decides: how the pairs of a row become tensors, on which workers, in which order. The order is the plan's alone, so
resuming at step n means starting to read at step n.

Shapes: P pairs of one micro-batch, S sequences of its trees, R entries of rankings.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from btrm_core.data import TokenStore
from btrm_core.packing import Batch, EpochPlan, Tree, collate, part

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
        entry_R: for losses over whole rankings, the sequence of each entry of a ranking; one that two rankings of a
            prompt hold has an entry in both.
        ranking_R: the ranking of each entry, counted within the micro-batch.
        wins_R: how many entries of its ranking each one beats.
        chosen_entry_P: the entry of each pair's chosen sequence.
        rejected_entry_P: likewise of the rejected one.
        pair_ids_P: which pairs these are; none for a dummy.
    """

    batch: Batch
    chosen_P: Tensor
    rejected_P: Tensor
    weight_P: Tensor
    margin_P: Tensor
    probability_P: Tensor
    entry_R: Tensor
    ranking_R: Tensor
    wins_R: Tensor
    chosen_entry_P: Tensor
    rejected_entry_P: Tensor
    pair_ids_P: np.ndarray

    def sides(self, rewards_S: Tensor) -> tuple[Tensor, Tensor]:
        """The rewards of the chosen and of the rejected sequence of every pair.

        Args:
            rewards_S: Rewards of all sequences of `batch`, in its order; gradients flow through.

        Returns:
            Two tensors [P], chosen first, of the type of `rewards_S`; for a dummy, those of its stand-in pair.
        """
        return rewards_S.index_select(0, self.chosen_P), rewards_S.index_select(0, self.rejected_P)

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`; without waiting where the memory is pinned.

        Args:
            device: Where the step computes; pair ids stay on the host.
        """
        return self._moved(
            self.batch.to(device, non_blocking=True), lambda tensor: tensor.to(device, non_blocking=True)
        )

    def sent_to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on `device`, through page-locked memory where the host would wait for a GPU otherwise.

        Args:
            device: Where it is computed.
        """
        return (self.pin_memory() if device.type == "cuda" else self).to(device)

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


class _ByValue(pickle.Pickler):
    """Pickles tensors as their numbers.

    Through torch's own pickling each tensor that a worker sends is a file descriptor, and a step of many micro-batches
    with some twenty tensors each has more of them than a process may have open.
    """

    def reducer_override(self, value: Any) -> Any:
        """How a tensor is made again from its numbers; everything else as usual."""
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def to_bytes(step: StepBatches) -> bytes:
    """A step as bytes, from which `pickle.loads` makes it again.

    Args:
        step: A step whose tensors are on the host.
    """
    buffer = io.BytesIO()
    _ByValue(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(step)
    return buffer.getvalue()


class _Bytes:
    """A step on its way from a worker; what pins memory in the main process makes its tensors there."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def pin_memory(self) -> StepBatches:
        """The step in page-locked memory; `DataLoader` calls this."""
        return self.step().pin_memory()

    def step(self) -> StepBatches:
        """The step."""
        made: StepBatches = pickle.loads(self.data)
        return made


class _Steps(IterableDataset[StepBatches | _Bytes]):
    """The steps from `first` to `last`; worker w of n builds every n-th, so that their order is kept."""

    def __init__(self, pairs: TokenStore, plans: Sequence[EpochPlan], rank: int, form: RowForm, first: int, last: int):
        self.pairs, self.plans, self.rank, self.form = pairs, plans, rank, form
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[StepBatches | _Bytes]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(self.first + offset, self.last, stride):
            step = self.build(index)
            yield _Bytes(to_bytes(step)) if worker else step

    def build(self, index: int) -> StepBatches:
        steps_per_epoch = self.plans[0].num_steps
        step = self.plans[index // steps_per_epoch].step(index % steps_per_epoch)
        return StepBatches(
            index=index,
            micro_batches=[build_micro_batch(self.pairs, row, self.form) for row in step.rows[self.rank]],
            total_weight=float(self.pairs.weight_P[step.pair_ids].astype(np.float64).sum()),
            rank_imbalance=step.imbalance,
        )


def build_micro_batch(store: TokenStore, row: np.ndarray, form: RowForm) -> MicroBatch:
    """Lay the trees of a row's pairs out, packed or as padded lines, with the pairs' weights, margins and labels.

    An empty row gives a dummy: the first pair with weight 0, so that every process runs the same number of forward
    and backward passes.

    Args:
        store: The encoded pairs.
        row: Indices of pairs in `store`, in any order; the micro-batch has them in the order of their groups.
        form: Shared, packed or padded, for which kernel, and to which multiple lengths are rounded up.

    Returns:
        The micro-batch on the host.
    """
    ids_P = np.asarray(row if len(row) else [0], dtype=np.int64)
    ids_P = ids_P[np.argsort(store.group_P[ids_P], kind="stable")]
    trees, chosen_P, rejected_P = _trees(store, ids_P)
    batch = collate(
        trees,
        kernel=form.kernel,
        share_prefix=form.layout == "shared",
        multiple_of=form.multiple_of,
        pad_id=form.pad_id,
    )
    repeated = int(store.places.tokens_P[ids_P].sum()) - batch.useful  # a sequence of several pairs counts for each
    batch = replace(batch, useful=batch.useful + repeated, shared=batch.shared + repeated)
    entry_R, ranking_R, wins_R, entries_2P = _rankings(store, ids_P, chosen_P, rejected_P)
    number = len(ids_P)
    return MicroBatch(
        batch=batch,
        chosen_P=torch.from_numpy(chosen_P),
        rejected_P=torch.from_numpy(rejected_P),
        weight_P=torch.from_numpy(store.weight_P[ids_P] if len(row) else np.zeros(number, np.float32)),
        margin_P=torch.from_numpy(store.margin_P[ids_P]),
        probability_P=torch.from_numpy(store.probability_P[ids_P]),
        entry_R=torch.from_numpy(entry_R),
        ranking_R=torch.from_numpy(ranking_R),
        wins_R=torch.from_numpy(wins_R),
        chosen_entry_P=torch.from_numpy(entries_2P[:number]),
        rejected_entry_P=torch.from_numpy(entries_2P[number:]),
        pair_ids_P=ids_P if len(row) else ids_P[:0],
    )


def _trees(store: TokenStore, ids_P: np.ndarray) -> tuple[list[Tree], np.ndarray, np.ndarray]:
    """The trees of some pairs, without conversations that none of them compares, and where each pair's are."""
    trees: list[Tree] = []
    chosen_P, rejected_P = np.empty(len(ids_P), np.int64), np.empty(len(ids_P), np.int64)
    before = 0
    groups, first = np.unique(store.group_P[ids_P], return_index=True)
    for group, own in zip(groups.tolist(), np.split(np.arange(len(ids_P)), first[1:]), strict=True):
        sides = np.stack([store.chosen_P[ids_P[own]], store.rejected_P[ids_P[own]]])
        places, local = np.unique(sides, return_inverse=True)
        tree = store.group(group)
        trees.append(tree if len(places) == len(tree.leaf) else part(tree, places))
        chosen_P[own], rejected_P[own] = before + local.reshape(sides.shape)
        before += len(places)
    return trees, chosen_P, rejected_P


def _rankings(
    store: TokenStore, ids_P: np.ndarray, chosen_P: np.ndarray, rejected_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The entries of the rankings that pairs are of: sequence, ranking, wins; and the entries of both sides."""
    _, ranking_P = np.unique(store.places.unit_P[ids_P], return_inverse=True)
    width = int(max(chosen_P.max(), rejected_P.max())) + 1
    codes = np.tile(ranking_P, 2) * width + np.concatenate([chosen_P, rejected_P])
    entries, entries_2P = np.unique(codes, return_inverse=True)
    won_P = store.probability_P[ids_P] > 0.5
    wins_R = np.bincount(entries_2P[: len(ids_P)][won_P], minlength=len(entries))
    return entries % width, entries // width, wins_R, entries_2P


def steps(
    pairs: TokenStore, plans: Sequence[EpochPlan], *, rank: int, form: RowForm, first: int, last: int, workers: int
) -> Iterator[StepBatches]:
    """The steps `first` to `last` (exclusive) of this process, built by `workers` processes ahead of their use.

    Args:
        pairs: The encoded training pairs.
        plans: One for each epoch, all with the same number of steps.
        rank: Of this process, whose rows are built.
        form: How rows are laid out.
        first: Index over all epochs of the first step.
        last: One past the index of the last step.
        workers: Loader processes; 0 builds each step when it is asked for.
    """
    source = _Steps(pairs, plans, rank, form, first, last)
    pinned = torch.cuda.is_available()
    if workers == 0 or last - first < 2:
        for index in range(first, last):
            yield source.build(index).pin_memory() if pinned else source.build(index)
        return
    for step in DataLoader(source, batch_size=None, num_workers=workers, prefetch_factor=2, pin_memory=pinned):
        yield step.step() if isinstance(step, _Bytes) else step
