"""The values of a run, without functions: what it is trained on, what it works with, what it leaves."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core.chat import ChatFormat
from btrm_core.data import PairData, TokenStore
from btrm_core.evaluation import PairRewards
from btrm_core.families import Family
from btrm_core.packing import EpochPlan, RowForm
from btrm_core.settings import RunConfig
from btrm_core.training.processes import Runtime
from btrm_core.training.report import Reporter
from btrm_core.training.schedule import Progress, Schedule


@dataclass(frozen=True)
class Job:
    """What is to be done, settled before anything is loaded.

    Attributes:
        config: the settings, resolved: the family's recipe has filled what the user left open.
        family: who answers the hooks.
        chat: what the ids of a conversation are.
        output: the directory of the run; its model goes to `output/model`.
    """

    config: RunConfig
    family: Family
    chat: ChatFormat
    output: Path


@dataclass(frozen=True)
class Data:
    """Encoded pairs of both sides, and what was reported about them.

    Attributes:
        train: pairs to train on.
        eval: held-out pairs; None without any.
        report: sources, fingerprint and counts of reading and encoding, as JSON values for `btrm.json`.
        lines: what the user is told of them.
        eval_rows: the held-out pairs as text; None without any.
    """

    train: TokenStore
    eval: TokenStore | None
    report: dict[str, Any]
    lines: list[str]
    eval_rows: PairData | None


@dataclass
class Session:
    """A run under way: everything its steps share.

    Attributes:
        job: what is to be done.
        runtime: this process among those of the run.
        data: the pairs.
        engine: the DeepSpeed engine around the reward model.
        form: how rows are laid out.
        epoch: the plan of the first epoch.
        schedule: steps and learning rates.
        reporter: writes the figures; None writes none.
        identity: what must be the same for another run to go on from this one's checkpoints.
        tokens_per_batch: the token budget in force: the setting, until `--auto-budget` halves it.
        seconds_before: how long the run had trained before this start.
        evaluated: the step of the last evaluation, and its rewards (P, 2).
        best_examples: held-out pairs with their rewards from the best model so far, for the end.
        best_rewards_P2: the rewards that the best model so far gives the held-out pairs.
    """

    job: Job
    runtime: Runtime
    data: Data
    engine: Any
    form: RowForm
    epoch: EpochPlan
    schedule: Schedule
    reporter: Reporter | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    tokens_per_batch: int = field(init=False)
    seconds_before: float = 0.0
    evaluated: tuple[int, np.ndarray] | None = None
    best_examples: tuple[dict[str, Any], ...] = ()
    best_rewards_P2: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.tokens_per_batch = self.job.config.train.tokens_per_batch

    @property
    def config(self) -> RunConfig:
        """The resolved settings."""
        return self.job.config


@dataclass(frozen=True)
class Outcome:
    """What a run left: the model's directory (None if it was stopped before its end) and the last evaluation."""

    directory: Path | None
    evaluation: dict[str, Any] | None
    progress: Progress
    signal: int | None = None
    """What told this process to stop before the end; 0 if it was another process that was told."""
    examples: tuple[dict[str, Any], ...] = ()
    held_out: PairRewards | None = None
    """The rewards that the saved model gives the held-out pairs; None if there are none."""

    @property
    def exit_code(self) -> int:
        """0 if the run is done; else 128 plus the signal that stopped it (143 if another process was told)."""
        if self.signal is None:
            return 0
        return 128 + (self.signal or signal.SIGTERM)
