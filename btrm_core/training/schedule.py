"""How long a run is, the learning rate of each step, and where the run stands.

Decides: the learning rate as a function of the step alone, so that resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from btrm_core.config import settled
from btrm_core.packing import EpochPlan, PairPlaces, RowForm, StepBudget, plan_epoch
from btrm_core.settings import RunConfig


@dataclass(frozen=True)
class Schedule:
    """How many steps there are and the learning rate of each; derived once, from the plan and the settings.

    >>> s = Schedule(total_steps=10, steps_per_epoch=5, warmup_steps=2, peak=1.0)
    >>> [round(s.learning_rate(i), 2) for i in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    peak: float

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Schedule:
        """The schedule of a run whose settings are resolved.

        Args:
            config: Resolved settings.
            steps_per_epoch: Optimiser steps of one epoch.
        """
        train = config.train
        total = max(1, round(steps_per_epoch * settled(train.epochs, "train.epochs")))
        if train.max_steps is not None:
            total = min(total, train.max_steps)
        return cls(
            total_steps=total,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=math.ceil(total * settled(train.warmup_ratio, "train.warmup_ratio")),
            peak=settled(train.learning_rate, "train.learning_rate"),
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero (arXiv:1608.03983, equation 5, without restarts).

        Args:
            step: Index of the step over the whole run, from 0.

        Returns:
            The rate, `peak` at the end of the warm-up.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / span))


def plan_of_epoch(
    config: RunConfig, pairs: PairPlaces, form: RowForm, world: int, tokens_per_batch: int, epoch: int = 0
) -> EpochPlan:
    """Which rows each process computes in the steps of one epoch.

    Args:
        config: Resolved settings.
        pairs: The pairs that are trained on, as places in the trees of their groups.
        form: How rows are laid out.
        world: Number of processes; those that share rows are one rank of the plan.
        tokens_per_batch: The token budget of a process; it moves no pair from one step to another.
        epoch: Which epoch, from 0; each has its own order.
    """
    share = config.distributed.sequence_parallel
    budget = StepBudget(
        pairs_per_step=settled(config.train.pairs_per_step, "train.pairs_per_step"),
        tokens_per_batch=tokens_per_batch * share,
        world=world // share,
        seed=config.train.seed,
        group_by=config.data.group_by,
        whole=config.loss.ranking == "plackett-luce",
    )
    return plan_epoch(pairs, form, budget, epoch)


EARLY = "early"
"""How `Progress.stopped` begins where more steps would not have helped."""


@dataclass
class Progress:
    """What changes while training, apart from weights and optimiser: all that a resumed run must know."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    """The best value so far of the figure that says what is best, turned so that lower is better."""
    best_by: str = "loss"
    """That figure."""
    best_step: int = 0
    evaluations_since_best: int = 0
    owes_evaluation: bool = False
    """The evaluation after `step` was put off for a checkpoint, or broken off: it comes before another step."""
    skipped_steps: list[int] = field(default_factory=list)
    stopped: str | None = None

    def is_done(self, total_steps: int) -> bool:
        """Whether nothing is left to do: all steps are done, or more would not have helped.

        Args:
            total_steps: Of the run.
        """
        return self.step >= total_steps or (self.stopped or "").startswith(EARLY)
