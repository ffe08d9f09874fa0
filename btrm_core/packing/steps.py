"""Decides which pairs make up a step, and which rows of it each rank computes.

The optimisation comes first: the pairs of a step are a slice of a permutation of (seed, epoch),
whatever the budget, the number of ranks and the layout. Only then are they laid out: the longest
pairs first, each into the cheapest row so far, over world x k rows, with the smallest k that keeps
every row within the budget. Every rank computes the same number of rows, since ranks wait for each
other at every row under ZeRO-2 and 3. Rows vary in length instead of being filled up, so nothing is
padded but the rounding.

Everything is pure: a step depends on its index alone, so resuming needs one integer.

P: pairs, or groups of K sequences, of the whole data set.
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
from btrm_core.packing.groups import Lengths
from btrm_core.packing.rows import RowForm

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    IntArray = NDArray[np.int64]
    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Step:
    """The work of one optimiser step.

    Attributes:
        pair_ids: the step's pairs, in the epoch's order.
        rows: `rows[rank][i]` holds the pair ids of the i-th row of a rank, most expensive rows first;
            every rank has as many rows, and a row may be empty.
        cost: what each rank computes, in tokens; attention counted as what it costs more.
    """

    pair_ids: IntArray
    rows: tuple[tuple[IntArray, ...], ...]
    cost: tuple[float, ...]

    @property
    def num_pairs(self) -> int:
        """Pairs of the step: the last one of an epoch may have fewer."""
        return len(self.pair_ids)

    @property
    def imbalance(self) -> float:
        """Cost of the busiest rank over the mean; 1 is perfect."""
        return max(self.cost) * len(self.cost) / max(sum(self.cost), 1e-9)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """All steps of one epoch; `step(i)` computes one.

    Attributes:
        order_P: the epoch's permutation of the pairs.
        tokens_P: tokens that a pair adds to a row; in padded plans, the length of its longest line.
        cost_P: what a pair costs, in tokens.
        pairs_per_step: pairs of every step but the last.
        budget: largest number of tokens of a row, rounded rows counted; a row with a single pair may
            exceed it.
        world: number of ranks.
        multiple_of: what rows will be rounded up to.
        lines_P: None for packed rows; else the lines of a pair in a padded batch.
    """

    order_P: IntArray
    tokens_P: IntArray
    cost_P: FloatArray
    pairs_per_step: int
    budget: int
    world: int
    multiple_of: int
    lines_P: IntArray | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs of the epoch."""
        return len(self.order_P)

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the last one included even if it is smaller."""
        return -(-self.num_pairs // self.pairs_per_step)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Step]:
        return (self.step(index) for index in range(self.num_steps))

    def step(self, index: int) -> Step:
        """Lay out one step.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of an epoch of {self.num_steps} steps")
        ids = self.order_P[index * self.pairs_per_step : (index + 1) * self.pairs_per_step]
        rows = self._packed_rows(ids) if self.lines_P is None else self._padded_rows(ids)
        ranks = share_out(rows, [self._row_cost(row) for row in rows], self.world)
        return Step(pair_ids=ids, rows=ranks, cost=tuple(sum(map(self._row_cost, rank)) for rank in ranks))

    def _row_cost(self, row: IntArray) -> float:
        return float(self.cost_P[row].sum() if self.lines_P is None else self.row_tokens(row))

    def row_tokens(self, row: IntArray) -> int:
        """Tokens that a row or padded batch of these pairs computes, rounding and padding included."""
        if not len(row):
            return 0
        if self.lines_P is None:
            return _rounded(int(self.tokens_P[row].sum()), self.multiple_of)
        return int(self.lines_P[row].sum()) * _rounded(int(self.tokens_P[row].max()), self.multiple_of)

    @property
    def oversize(self) -> int:
        """Pairs that exceed the budget and get a row of their own."""
        lines = 1 if self.lines_P is None else self.lines_P
        return int((lines * _rounded_array(self.tokens_P, self.multiple_of) > self.budget).sum())

    @functools.cached_property
    def padding_percent(self) -> float:
        """Share of padding among the tokens computed, in per cent, estimated on up to 16 steps."""
        if not self.num_steps:
            return 0.0
        computed = useful = 0
        for index in np.unique(np.linspace(0, self.num_steps - 1, 16).astype(int)):
            step = self.step(int(index))
            computed += sum(self.row_tokens(row) for rank in step.rows for row in rank)
            useful += int(self._own_tokens(step.pair_ids))
        return 100.0 * (1 - useful / max(computed, 1))

    def _own_tokens(self, ids: IntArray) -> float:
        return float(self.tokens_P[ids].sum() if self.lines_P is None else self.cost_P[ids].sum())

    def _packed_rows(self, ids: IntArray) -> list[IntArray]:
        ids = ids[np.argsort(-self.cost_P[ids], kind="stable")]
        tokens, cost = self.tokens_P[ids].tolist(), self.cost_P[ids].tolist()
        limit = self.budget // self.multiple_of * self.multiple_of
        own = [i for i, count in enumerate(tokens) if count > limit]
        rest = [i for i, count in enumerate(tokens) if count <= limit]
        needed = len(own) + math.ceil(sum(tokens[i] for i in rest) / limit) if rest else len(own)
        per_rank = max(1, -(-needed // self.world))
        while True:
            bins = per_rank * self.world - len(own)
            filled = fill(rest, tokens, cost, bins, limit)
            if filled is not None:
                even = even_out(filled, self.tokens_P[ids], self.cost_P[ids], limit)
                return [ids[[i]] for i in own] + [ids[members] for members in even]
            per_rank += 1

    def _padded_rows(self, ids: IntArray) -> list[IntArray]:
        ids = ids[np.argsort(-self.tokens_P[ids], kind="stable")]
        per_rank = 1
        while True:
            rows = np.array_split(ids, per_rank * self.world)
            if all(len(row) <= 1 or self.row_tokens(row) <= self.budget for row in rows):
                return rows
            per_rank += 1


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _rounded_array(counts: IntArray, multiple: int) -> IntArray:
    return -(-counts // multiple) * multiple


def plan(
    shared_P: ArrayLike,
    chosen_P: ArrayLike,
    rejected_P: ArrayLike,
    *,
    pairs_per_step: int,
    tokens_per_batch: int,
    world: int,
    seed: int,
    epoch: int,
    share_prefix: bool = True,
    multiple_of: int = 1,
    hidden_size: int = 2048,
) -> EpochPlan:
    """Plan an epoch of packed rows of pairs: `plan_groups` for groups of two.

    Args:
        shared_P: tokens that a pair's sequences begin with.
        chosen_P: further tokens of the chosen sequence.
        rejected_P: further tokens of the rejected sequence.
        pairs_per_step: as for `plan_groups`, like all further arguments.
        tokens_per_batch: see there.
        world: see there.
        seed: see there.
        epoch: see there.
        share_prefix: see there.
        multiple_of: see there.
        hidden_size: see there.

    Raises:
        ConfigError: a number is below what makes sense, or there is nothing to plan.
    """
    return plan_epoch(
        Lengths.of_pairs(shared_P, chosen_P, rejected_P),
        pairs_per_step=pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        world=world,
        seed=seed,
        epoch=epoch,
        share_prefix=share_prefix,
        multiple_of=multiple_of,
        hidden_size=hidden_size,
    )


def plan_epoch(
    lengths: Lengths,
    *,
    pairs_per_step: int,
    tokens_per_batch: int,
    world: int,
    seed: int,
    epoch: int,
    padded: bool = False,
    share_prefix: bool = True,
    multiple_of: int = 1,
    hidden_size: int = 2048,
) -> EpochPlan:
    """Plan an epoch.

    Padded batches are the fallback, and the reference to compare with: the groups of a step, sorted by length, are cut
    into batches of equally many groups (give or take one), as few as keep every batch within the budget with its
    padding counted. Steps hold the same groups either way.

    Args:
        lengths: tokens of the groups; a pair is a group of two.
        pairs_per_step: groups of one optimiser step, over all ranks.
        tokens_per_batch: largest number of tokens of a row or padded batch, rounding and padding included; a group
            above it gets a row of its own (`Plan.oversize` counts them).
        world: number of ranks.
        seed: the run's seed.
        epoch: the epoch, from 0; each has its own order.
        padded: whether every sequence gets a line of its own, padded, instead of packed rows.
        share_prefix: whether packed rows share beginnings.
        multiple_of: what rows will be rounded up to.
        hidden_size: the model's width, on which it depends what attention costs.

    Returns:
        The plan, the same for the same arguments. Which groups make up a step depends on their number,
        `pairs_per_step`, `seed` and `epoch` alone.

    Raises:
        ConfigError: a number is below what makes sense, or there is nothing to plan.
    """
    settings = {"pairs_per_step": pairs_per_step, "tokens_per_batch": tokens_per_batch, "world": world}
    for name, value in {**settings, "multiple_of": multiple_of}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    number = len(lengths.shared_P)
    if not number:
        raise ConfigError("there are no pairs to plan; expected at least one")
    if padded:
        tokens_P, cost_P = lengths.longest_P, lengths.tokens(share_prefix=False).astype(np.float64)
    else:
        tokens_P, cost_P = lengths.tokens(share_prefix), lengths.cost(share_prefix, hidden_size)
    return EpochPlan(
        order_P=np.random.default_rng([seed, epoch]).permutation(number),
        tokens_P=tokens_P,
        cost_P=cost_P,
        pairs_per_step=pairs_per_step,
        budget=tokens_per_batch,
        world=world,
        multiple_of=multiple_of,
        lines_P=lengths.count_P if padded else None,
    )


def make_plan(
    lengths: Lengths, form: RowForm, *, pairs_per_step: int, tokens_per_batch: int, world: int, seed: int, epoch: int
) -> EpochPlan:
    """The plan of one epoch of groups of these lengths, for rows of the given form."""
    return plan_epoch(
        lengths,
        pairs_per_step=pairs_per_step,
        tokens_per_batch=tokens_per_batch,
        world=world,
        seed=seed,
        epoch=epoch,
        padded=form.layout == "padded",
        share_prefix=form.layout == "shared",
        multiple_of=form.multiple_of,
    )
