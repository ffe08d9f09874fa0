"""Decides which pairs make up a step, and which rows of it each rank computes.

The optimisation comes first: the pairs of a step are a slice of a permutation of (seed, epoch),
whatever the budget, the number of ranks and the layout. What is shuffled is the prompt, so that its
pairs fall into one step (InstructGPT, arXiv:2203.02155, section 3.5), or the pair. A prompt that does
not fit into what is left of a step goes on in the next one; every step but the last has as many pairs
as asked for.

Only then are they laid out. The pairs of a prompt that a step holds are one tree; a tree without room
in a row is cut into parts that repeat little. The most expensive come first, each into the cheapest row
so far, over world x k rows, with the smallest k that keeps every row within the budget. Every rank
computes the same number of rows, since ranks wait for each other at every row under ZeRO-2 and 3. Rows
vary in length instead of being filled up, so nothing is padded but the rounding.

Everything is pure: a step depends on its index alone, so resuming needs one integer.

P pairs, U units (what counts as one pair of a step), I items (the pairs of a tree in a row).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from btrm_core.errors import ConfigError
from btrm_core.packing.balance import even_out, fill, share_out
from btrm_core.packing.forest import PairPlaces, Sizes
from btrm_core.packing.forms import RowForm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]

GROUP_BY = ("prompt", "pair")
SAMPLED_STEPS = 16


@dataclass(frozen=True)
class StepBudget:
    """What a step is, and what a row may be.

    Attributes:
        pairs_per_step: units of one optimiser step, over all ranks.
        tokens_per_batch: largest number of tokens of a row or padded batch, rounding and padding included; what
            exceeds it by itself gets a row of its own (`EpochPlan.oversize` counts it).
        world: number of ranks.
        seed: the run's seed.
        group_by: what is shuffled: "prompt" or "pair".
        whole: whether the pairs of a unit must be in one row, for losses over whole rankings.
        hidden_size: the model's width, on which it depends what attention costs.

    Raises:
        ConfigError: a number is below what makes sense, or `group_by` is neither.
    """

    pairs_per_step: int
    tokens_per_batch: int
    world: int = 1
    seed: int = 0
    group_by: str = "prompt"
    whole: bool = False
    hidden_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("pairs_per_step", "tokens_per_batch", "world"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.group_by not in GROUP_BY:
            raise ConfigError(f"group_by is '{self.group_by}'; expected one of {', '.join(GROUP_BY)}")


@dataclass(frozen=True, eq=False)
class Step:
    """The work of one optimiser step.

    Attributes:
        pair_ids: the step's pairs, in the epoch's order.
        rows: `rows[rank][i]` holds the pair ids of the i-th row of a rank, most expensive rows first; the pairs of a
            tree next to each other. Every rank has as many rows, and a row may be empty.
        cost: what each rank computes, in tokens; attention counted as what it costs more.
    """

    pair_ids: IntArray
    rows: tuple[tuple[IntArray, ...], ...]
    cost: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean; 1 is perfect."""
        return max(self.cost) * len(self.cost) / max(sum(self.cost), 1e-9)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All steps of one epoch; `step(i)` computes one.

    Attributes:
        pairs: the pairs, in the forest whose trees the rows compute.
        order_U: the epoch's order of the units.
        budget: what a step is, and what a row may be.
        multiple_of: what rows will be rounded up to.
        padded: whether every sequence gets a line of its own, padded, instead of packed rows.
    """

    pairs: PairPlaces
    order_U: IntArray
    budget: StepBudget
    multiple_of: int = 1
    padded: bool = False

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the last one included even if it is smaller."""
        return -(-len(self.order_U) // self.budget.pairs_per_step)

    @property
    def limit(self) -> int:
        """Tokens of the largest row that the rounding keeps within the budget."""
        return self.budget.tokens_per_batch // self.multiple_of * self.multiple_of

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(self.num_steps))

    def step(self, index: int) -> Step:
        """Lay out one step.

        Args:
            index: number of the step in the epoch, from 0.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of an epoch of {self.num_steps} steps")
        size = self.budget.pairs_per_step
        ids = self.pairs.of_units(self.order_U[index * size : (index + 1) * size])
        items, sizes = self._items(ids)
        if self.padded:
            rows = self._padded_rows(sizes)
            costs = [float(self._lines(sizes, row)) for row in rows]
        else:
            cost = sizes.cost_I(self.budget.hidden_size)
            rows = self._packed_rows(sizes, cost)
            costs = [float(cost[row].sum()) for row in rows]
        filled = [np.concatenate([ids[:0], *(items[i] for i in row)]) for row in rows]
        numbers = share_out([np.array([number]) for number in range(len(rows))], costs, self.budget.world)
        return Step(
            pair_ids=ids,
            rows=tuple(tuple(filled[int(number[0])] for number in rank) for rank in numbers),
            cost=tuple(sum(costs[int(number[0])] for number in rank) for rank in numbers),
        )

    def _items(self, ids: IntArray) -> tuple[list[IntArray], Sizes]:
        """The step's pairs by their trees, trees without room in a row cut, and what each takes."""
        items = self.pairs.items(ids)
        sizes = self.pairs.sizes(items)
        taken = sizes.lines_I * _rounded(sizes.longest_I, self.multiple_of) if self.padded else sizes.room_I
        large = taken > (self.budget.tokens_per_batch if self.padded else self.limit)
        if not large.any():
            return items, sizes
        cut: list[IntArray] = []
        for item, is_large in zip(items, large, strict=True):
            if is_large and self.padded:  # nothing is shared in padded lines, so nothing is lost
                cut += np.split(item, np.flatnonzero(np.diff(self.pairs.unit_P[item])) + 1)
            else:
                cut += self.pairs.divided(item, self.limit, self.budget.whole) if is_large else [item]
        return cut, self.pairs.sizes(cut)

    def _lines(self, sizes: Sizes, row: IntArray) -> int:
        """Tokens of a padded batch, padding included."""
        longest = _rounded(sizes.longest_I[row].max(initial=0), self.multiple_of)
        return int(sizes.lines_I[row].sum() * longest)

    def row_tokens(self, row: IntArray) -> int:
        """Tokens that a row or padded batch of these pairs computes, rounding and padding included.

        Args:
            row: numbers of the row's pairs, as in `Step.rows`.
        """
        sizes = self.pairs.sizes(self.pairs.items(row))
        if self.padded:
            return self._lines(sizes, np.arange(len(sizes.lines_I)))
        return int(_rounded(sizes.tokens_I.sum(), self.multiple_of))

    @functools.cached_property
    def oversize(self) -> int:
        """Pairs, or rankings that must stay whole, that exceed the budget and get a row of their own."""
        if self.padded:
            sizes = self.pairs.unit_sizes(whole=True)
            taken_U = sizes.lines_I * _rounded(sizes.longest_I, self.multiple_of)
            return int((taken_U > self.budget.tokens_per_batch).sum())
        starts_U = self.pairs.starts_U if self.budget.whole else np.arange(len(self.pairs) + 1)
        # Sharing makes a row smaller: only what is too large without it has to be looked at.
        large = np.flatnonzero(np.add.reduceat(self.pairs.tokens_P, starts_U[:-1]) > self.limit)
        items = [np.arange(starts_U[unit], starts_U[unit + 1]) for unit in large.tolist()]
        return int((self.pairs.sizes(items).room_I > self.limit).sum())

    @functools.cached_property
    def _sampled(self) -> tuple[int, int, int]:
        """Of up to 16 steps: tokens of separate passes, tokens without padding, tokens computed."""
        separate = own = computed = 0
        for index in np.unique(np.linspace(0, self.num_steps - 1, SAMPLED_STEPS).astype(int)):
            step = self.step(int(index))
            separate += int(self.pairs.tokens_P[step.pair_ids].sum())
            for row in (row for rank in step.rows for row in rank):
                sizes = self.pairs.sizes(self.pairs.items(row))
                own += int(sizes.tokens_I.sum())
                computed += self.row_tokens(row)
        return separate, own, computed

    @property
    def padding_percent(self) -> float:
        """Share of padding among the tokens computed, in per cent, estimated on up to 16 steps."""
        _, own, computed = self._sampled
        return 100.0 * (1 - own / max(computed, 1))

    @property
    def saved_percent(self) -> float:
        """Share of the tokens of separate passes that the rows do not compute, in per cent, on up to 16 steps."""
        separate, own, _ = self._sampled
        return 100.0 * (1 - own / max(separate, 1))

    def _packed_rows(self, sizes: Sizes, cost_I: FloatArray) -> list[IntArray]:
        order = np.argsort(-cost_I, kind="stable")
        room, cost, limit = sizes.room_I[order], cost_I[order], self.limit
        own = np.flatnonzero(room > limit).tolist()
        rest = np.flatnonzero(room <= limit).tolist()
        needed = len(own) + (math.ceil(int(room[rest].sum()) / limit) if rest else 0)
        per_rank = max(1, -(-needed // self.budget.world))
        while True:
            bins = per_rank * self.budget.world - len(own)
            filled = fill(rest, room.tolist(), cost.tolist(), bins, limit)
            if filled is not None:
                even = even_out(filled, room, cost, limit)
                return [order[[i]] for i in own] + [order[np.array(members, dtype=np.int64)] for members in even]
            per_rank += 1

    def _padded_rows(self, sizes: Sizes) -> list[IntArray]:
        """Batches of equally many items, sorted by length, as few as keep each within the budget."""
        order = np.argsort(-sizes.longest_I, kind="stable")
        per_rank = 1
        while True:
            rows = np.array_split(order, per_rank * self.budget.world)
            if all(len(row) <= 1 or self._lines(sizes, row) <= self.budget.tokens_per_batch for row in rows):
                return rows
            per_rank += 1


def _rounded(counts: IntArray, multiple: int) -> IntArray:
    return -(-counts // multiple) * multiple


def plan_epoch(pairs: PairPlaces, form: RowForm, budget: StepBudget, epoch: int = 0) -> EpochPlan:
    """Plan an epoch.

    Padded batches are the fallback, and the reference to compare with. Steps hold the same pairs either way.

    Args:
        pairs: the pairs.
        form: how they are laid out.
        budget: what a step is, and what a row may be.
        epoch: the epoch, from 0; each has its own order.

    Returns:
        The plan, the same for the same arguments. Which pairs make up a step depends on the units and trees of the
        pairs, on `pairs_per_step`, `seed`, `group_by` and `epoch` alone.

    Raises:
        ConfigError: there is nothing to plan.
    """
    if not len(pairs):
        raise ConfigError("there are no pairs to plan; expected at least one")
    random = np.random.default_rng([budget.seed, epoch])
    if budget.group_by == "pair":
        order_U = random.permutation(pairs.num_units)
    else:
        place_G = np.empty(len(pairs.forest), dtype=np.int64)
        place_G[random.permutation(len(pairs.forest))] = np.arange(len(pairs.forest))
        order_U = np.argsort(place_G[pairs.tree_P[pairs.starts_U[:-1]]], kind="stable")
    return EpochPlan(
        pairs=pairs if form.layout == "shared" else pairs.unshared,
        order_U=order_U,
        budget=budget,
        multiple_of=form.multiple_of,
        padded=form.layout == "padded",
    )
