"""The values of a run, without functions: what it is trained on, what it works with, what it leaves."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core.chat import ChatFormat
from btrm_core.data import PairData, TokenStore
from btrm_core.families import Family
from btrm_core.packing import RowForm
from btrm_core.settings import RunConfig
from btrm_core.training.processes import Runtime
from btrm_core.training.report import Reporter
from btrm_core.training.schedule import Progress, Schedule


@dataclass(frozen=True)
class Data:
    """Encoded pairs of both sides, and what was reported about them."""

    train: TokenStore
    eval: TokenStore | None
    report: dict[str, Any]
    lines: list[str]
    eval_rows: PairData | None


@dataclass
class Session:
    """A run under way: everything its steps share."""

    config: RunConfig
    family: Family
    chat: ChatFormat
    runtime: Runtime
    data: Data
    engine: Any
    form: RowForm
    plan: Schedule
    output: Path
    reporter: Reporter
    evaluated: tuple[int, np.ndarray] | None = None
    """The step of the last evaluation, and its rewards (P, 2)."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: the model's directory (None if it was stopped before its end) and the last evaluation."""

    directory: Path | None
    evaluation: dict[str, Any] | None
    progress: Progress
    signal: int | None = None
    """What told this process to stop before the end; 0 if it was another process that was told."""
    examples: tuple[dict[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; 143 if another process was told to stop, or its launcher took that for the end; else 0."""
        if self.signal == 0:
            return 128 + signal.SIGTERM
        return 130 if self.signal == signal.SIGINT else 0
