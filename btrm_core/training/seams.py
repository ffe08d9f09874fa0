"""What the training loop calls while it runs: logging, evaluating, saving, profiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from btrm_core import files
from btrm_core.config import keeps_best
from btrm_core.console import LongWork, say
from btrm_core.evaluation import NoRewardsError, figures_of
from btrm_core.model import device_name, mfu_per_token_rate
from btrm_core.training import resume
from btrm_core.training.loop import Seams
from btrm_core.training.processes import Interrupt
from btrm_core.training.profiling import Profiler
from btrm_core.training.rewards import pair_rewards
from btrm_core.training.saving import save_run
from btrm_core.training.schedule import Progress
from btrm_core.training.session import Session
from btrm_core.training.summary import examples


def seams(session: Session, interrupt: Interrupt) -> Seams:
    """What the training loop of this run calls.

    Args:
        session: The run.
        interrupt: Knows whether this process was asked to stop.
    """
    config, runtime, output = session.config, session.runtime, session.job.output

    def save(progress: Progress) -> None:
        if progress.stopped is None and not _room_for_a_checkpoint(session, progress.step):
            return

        def write_model(directory: Path) -> None:
            save_run(session, progress, None, directory)

        with LongWork(f"saving the checkpoint of step {progress.step}"):
            path = resume.save(session, progress, write_model)
        say(runtime, f"step {progress.step}: checkpoint saved in {path}")

    def evaluate(step: int) -> dict[str, Any] | None:
        try:
            figures = evaluate_now(session, step, interrupt.requested)
        except NoRewardsError as error:
            if not keeps_best(config):
                raise
            say(runtime, f"step {step}: {error}")  # a better one may have been kept
            return None
        if figures is not None:
            _log(session, "eval", step, figures)
        return figures

    def improved(progress: Progress, figures: dict[str, Any]) -> None:
        if keeps_best(config):
            save_run(session, progress, figures, output / "best")
            session.best_examples = examples(session)
            session.best_rewards_P2 = None if session.evaluated is None else session.evaluated[1]

    rate = mfu_rate(session)

    def log(split: str, step: int, figures: dict[str, Any]) -> None:
        if split == "train" and rate is not None:
            figures["mfu_percent"] = rate * figures["tokens_per_second"]
        _log(session, split, step, figures)

    return Seams(
        log=log,
        evaluate=evaluate,
        improved=improved,
        save=save,
        stop_requested=interrupt.requested,
        say=lambda text: say(runtime, text),
        profiler=profiler_of(session),
    )


def _room_for_a_checkpoint(session: Session, step: int) -> bool:
    """Whether there is room for a checkpoint as large as the last one; if not, the run goes on, and that is said.

    All processes take part: the main one looks. A run that ended here would lose what it loses by going on at worst,
    and its time as well.
    """
    runtime, directory, lacking = session.runtime, session.job.output / "resume", ""
    if runtime.is_main and (there := resume.complete(directory)):
        needed = sum(path.stat().st_size for path in there[-1].rglob("*") if path.is_file())
        free = files.free_bytes(directory)
        if free < needed:
            lacking = (
                f"step {step}: no checkpoint, the disk of {directory} has {free / 1e9:.2f} GB free and one takes "
                f"{needed / 1e9:.2f} GB; training goes on and tries again at the next one, free some space: until then "
                f"{there[-1].name} is the last"
            )
            say(runtime, lacking)
    return not runtime.any(bool(lacking))


def _log(session: Session, split: str, step: int, figures: dict[str, Any]) -> None:
    if session.reporter is not None:
        session.reporter.log(split, step, figures)


def profiler_of(session: Session) -> Profiler:
    """Measures some steps of the main process, if that is asked for.

    Args:
        session: The run, in whose output directory the trace is written.
    """
    wanted = session.config.output.profile and session.runtime.is_main
    return Profiler(session.job.output if wanted else None, lambda text: say(session.runtime, text))


def mfu_rate(session: Session) -> float | None:
    """What `tokens_per_second` is multiplied with for the MFU; None on a CPU.

    Args:
        session: The run: its model's configuration, GPU, number of processes and mean length of conversations.

    Returns:
        Percent for one token a second; None as well where the GPU or the architecture is not known.
    """
    runtime, pairs = session.runtime, session.data.train
    if runtime.device.type != "cuda":
        return None
    length = float(pairs.lengths_P2.mean())
    config = session.engine.module.base_model.config
    name = device_name(runtime.device)
    return mfu_per_token_rate(config, name, runtime.world, length, session.config.lora.rank)


def evaluate_now(session: Session, step: int, stop: Callable[[], bool] = bool) -> dict[str, Any] | None:
    """Evaluate the live model after a step, once; None if there are no pairs to evaluate on.

    Args:
        session: The run; it keeps the rewards, so that a second call for the same step computes nothing.
        step: Steps done so far.
        stop: Whether this process was asked to stop.

    Returns:
        The figures of the held-out pairs.

    Raises:
        AskedToStop: a process was asked to stop meanwhile: save first.
        NoRewardsError: the model gives no pair two finite rewards.
    """
    pairs = session.data.eval
    if pairs is None:
        return None
    if session.evaluated is None or session.evaluated[0] != step:
        budget = session.tokens_per_batch
        rewards_P2 = pair_rewards(
            session.engine, pairs, session.runtime, session.form, tokens_per_batch=budget, stop=stop
        )
        session.evaluated = (step, rewards_P2)
    return figures_of(pairs.judged, session.evaluated[1])
