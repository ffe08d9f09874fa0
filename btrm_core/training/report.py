"""What a run shows and writes while it trains: a progress bar, `metrics.jsonl`, trackers, the closing summary.

Decides: names and places of the figures. Only the main process shows and writes; the bar goes to standard error, so
that standard output holds results alone.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from btrm_core.config import flat
from btrm_core.console import LongWork, finite, say
from btrm_core.errors import ConfigError, first_line
from btrm_core.evaluation import evaluation_text
from btrm_core.settings import RunConfig
from btrm_core.training.processes import Runtime

TRACKERS = ("wandb", "tensorboard", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


RUN_ID = ".run_id"
"""File in the output directory with the id by which wandb knows the run."""


def trackers(report_to: str) -> list[str]:
    """The trackers named by `--report-to`.

    Args:
        report_to: Names separated by commas; "none" and nothing name no tracker.

    Returns:
        The names in the order given.

    Raises:
        ConfigError: one of them is unknown.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--report-to {name!r}: expected none or one of {', '.join(TRACKERS)}")
    return names


def start_trackers(runtime: Runtime, directory: Path, first_step: int, config: RunConfig) -> None:
    """Start the trackers that Accelerate was told of, with the whole configuration; a resumed run goes on in its own.

    Args:
        runtime: This process, whose Accelerate was told which trackers there are.
        directory: The run's output directory; wandb's files and the id of its run are kept there.
        first_step: Steps done before; above 0 an earlier run is gone on with.
        config: Resolved settings; those that are None are not logged.

    Raises:
        ConfigError: a tracker does not start.
    """
    settings = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in flat(config).items() if v is not None}
    name = config.output.run_name or directory.name
    options: dict[str, dict[str, Any]] = {}
    if runtime.is_main and "wandb" in trackers(config.output.report_to):
        run_id = _run_id(directory, first_step)
        options["wandb"] = {"name": name, "dir": str(directory), "id": run_id, "resume": "allow"}
    if first_step:
        options["tensorboard"] = {"purge_step": first_step + 1}  # what follows is done, and logged, again
    try:
        runtime.accelerator.init_trackers(config.output.project, config=settings, init_kwargs=options)
    except Exception as error:  # every tracker has errors of its own
        hint = "; `wandb login`, or WANDB_MODE=offline keeps it local" if "wandb" in config.output.report_to else ""
        raise ConfigError(
            f"--report-to {config.output.report_to}: the tracker does not start ({first_line(error)}){hint}"
        ) from error


def _run_id(directory: Path, first_step: int) -> str:
    """The id kept in the output directory; a new one for a run that begins anew there."""
    kept = directory / RUN_ID
    if first_step and kept.exists():
        return kept.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(6)
    kept.write_text(made + "\n", encoding="utf-8")
    return made


class Reporter:
    """Writes the figures of a run; on other processes than the main one it does nothing but keep them in step."""

    def __init__(self, runtime: Runtime, directory: Path, config: RunConfig) -> None:
        self.runtime, self.directory, self.config = runtime, directory, config
        self.file: BinaryIO | None = None
        self.unwritten: set[str] = set()
        self.work: LongWork | None = None

    def open(self, total_steps: int, first_step: int) -> None:
        """Begin to show and write, or go on after `first_step`.

        Args:
            total_steps: Steps of the whole run, which is the length of the bar.
            first_step: Steps done before; 0 begins `metrics.jsonl` anew.

        Raises:
            ConfigError: a tracker does not start.
        """
        runtime, directory = self.runtime, self.directory
        if runtime.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            # without a buffer: a line that a full disk has not taken is lost, not kept to fail once more
            self.file = (directory / "metrics.jsonl").open("ab" if first_step else "wb", buffering=0)
        if trackers(self.config.output.report_to):
            start_trackers(runtime, directory, first_step, self.config)
        self.work = LongWork("training", total_steps, "step", done=first_step, stays=True)

    def log(self, split: str, step: int, figures: Mapping[str, Any]) -> None:
        """Write one line of `metrics.jsonl`, tell the trackers, and move the bar.

        A disk that is full and a tracker that fails are said once and end no run: the weights are what counts.

        Args:
            split: "train" or "eval".
            step: Steps done so far.
            figures: What is written; trackers get its numbers, and the accuracy of each entry of `subsets`.
        """
        numbers = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        numbers |= {f"{row['name']}/accuracy": row["accuracy"] for row in figures.get("subsets", ())}
        try:
            self.runtime.accelerator.log({f"{split}/{k}": v for k, v in numbers.items()}, step=step)
        except Exception as error:  # every tracker has errors of its own
            self._tell_once(f"--report-to {self.config.output.report_to}", error)
        if self.file is None:
            return
        line = {"split": split, "step": step, "time": round(time.time(), 3), **finite(figures)}
        broken = b"\n" if "metrics.jsonl" in self.unwritten else b""  # perhaps half a line is there
        try:
            self.file.write(broken + json.dumps(line).encode() + b"\n")
        except OSError as error:
            self._tell_once("metrics.jsonl", error)
        if split == "train":
            if self.work is not None:
                self.work.note(bar_text(figures))
                self.work.reach(step)
        else:
            say(self.runtime, f"step {step}: {evaluation_text(figures)}")

    def _tell_once(self, what: str, error: Exception) -> None:
        if what not in self.unwritten:
            say(self.runtime, f"{what}: figures are lost from now on ({first_line(error)}); training goes on")
        self.unwritten.add(what)

    def close_bar(self) -> None:
        """End the bar alone: no step follows."""
        if self.work is not None:
            self.work.close()

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        self.close_bar()
        if self.file is not None:
            self.file.close()
        try:
            for tracker in self.runtime.accelerator.trackers:
                tracker.finish()
        except Exception as error:  # as in `log`
            self._tell_once(f"--report-to {self.config.output.report_to}", error)


def bar_text(figures: Mapping[str, Any]) -> str:
    """The right end of the progress bar.

    Args:
        figures: Those of a training step (`loop.step_figures`).

    >>> speed = {"tokens_per_second": 1234.0, "useful_tokens_per_second": 2000.0, "pairs_per_second": 5.0}
    >>> bar_text({"loss": 0.5, "accuracy": 0.75, "learning_rate": 1e-5, **speed})
    'loss 0.500, acc 75%, 5.0 pairs/s, 1.2k tok/s (2.0k useful), lr 1.0e-05'
    """
    return (
        f"loss {figures['loss']:.3f}, acc {figures['accuracy']:.0%}, {figures['pairs_per_second']:.1f} pairs/s, "
        f"{figures['tokens_per_second'] / 1000:.1f}k tok/s ({figures['useful_tokens_per_second'] / 1000:.1f}k useful), "
        f"lr {figures['learning_rate']:.1e}"
    )
