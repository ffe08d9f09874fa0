"""The training loop: linear, the same for every family, exact for any split of a step.

Decides: what one optimiser step is, what is measured, when to evaluate, save and stop. The loss of a step is the sum
over its pairs divided by their total weight, whatever rows and processes they were put on: micro-batches contribute
sums, and DeepSpeed's mean over processes is multiplied away. Processes that share a row compute the same loss of it,
and each has the part of its gradient that goes through its own tokens: these add up like gradients of different rows.

Shapes: P pairs, S sequences.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from btrm_core.errors import TrainingError, first_line
from btrm_core.evaluation import badness
from btrm_core.settings import RunConfig
from btrm_core.training.loss import bradley_terry, plackett_luce
from btrm_core.training.metrics import PairSums, forget_peak_memory, named, step_figures
from btrm_core.training.micro_batches import MicroBatch, StepBatches, build_micro_batch, steps
from btrm_core.training.offload import activation_context
from btrm_core.training.processes import gather
from btrm_core.training.profiling import Profiler
from btrm_core.training.rewards import AskedToStop
from btrm_core.training.schedule import EARLY, Progress, plan_of_epoch
from btrm_core.training.session import Session


def _nothing(*_: Any) -> None:
    """A seam that is left empty."""


@dataclass(frozen=True)
class Seams:
    """What the loop calls at its seams; each is one function, and each is called on every process."""

    log: Callable[[str, int, dict[str, Any]], None] = _nothing
    """Write figures: split ("train" or "eval"), step, figures."""
    evaluate: Callable[[int], dict[str, Any] | None] = _nothing
    """Evaluate the live model after a number of steps; None if there is nothing to evaluate on."""
    improved: Callable[[Progress, dict[str, Any]], None] = _nothing
    """The evaluation loss is the lowest so far."""
    save: Callable[[Progress], None] = _nothing
    """Save a resumable checkpoint."""
    stop_requested: Callable[[], bool] = bool
    """True once this process was asked to stop (a signal)."""
    say: Callable[[str], None] = _nothing
    """Tell the user something, once over all processes."""
    profiler: Profiler = field(default_factory=lambda: Profiler(None, _nothing))
    """Measures some of the steps."""


@dataclass(frozen=True)
class Around:
    """What surrounds the passes of a step without changing its result."""

    profiler: Profiler
    activations: Callable[[], AbstractContextManager[Any]]
    """Where a forward pass keeps what its backward pass needs."""


def fit(session: Session, progress: Progress, seams: Seams) -> Progress:
    """Train from `progress.step` to the end of the schedule, or until asked to stop.

    Args:
        session: The run: engine, pairs, settings, schedule and form of its rows.
        progress: Where to start; changed in place and returned.
        seams: Logging, evaluation, saving and stopping.

    Returns:
        Where the run stands.

    Raises:
        TrainingError: the loss or the gradient is not finite, and such steps are not to be skipped; or the memory of
            the GPU does not suffice.
    """
    session.seconds_before = progress.seconds
    started = time.monotonic() - progress.seconds
    around = Around(seams.profiler, activation_context(session.engine, session.config.model.activation_offload))
    forget_peak_memory()
    while (progress.step < session.schedule.total_steps or progress.owes_evaluation) and not progress.stopped:
        session.engine.train()  # also after an evaluation that ran out of memory
        try:
            _run_steps(session, progress, seams, around, started)
        except torch.OutOfMemoryError as error:
            session.tokens_per_batch = smaller_budget(error, session)
            traceback.clear_frames(error.__traceback__)  # they hold all that the failed pass has computed
        else:
            break
        # here, where the exception is gone too: what it holds would leave no memory to go on with
        _discard_gradients(session)
        budget = session.tokens_per_batch
        seams.say(f"out of memory in step {progress.step + 1}: going on with --tokens-per-batch {budget}")
    around.profiler.close()
    return progress


def _run_steps(session: Session, progress: Progress, seams: Seams, around: Around, started: float) -> None:
    """From where the run stands to its end, or until it is stopped; the time of a step begins with waiting for it."""
    if progress.owes_evaluation:
        _evaluate_or_stop(session, progress, seams)
        if progress.stopped:
            return
    config, asked = session.config, time.monotonic()
    for step in around.profiler.waiting_for(_stream(session, progress.step)):
        sums, stop = _prepared_step(session, step, seams, around)
        seconds = time.monotonic() - asked
        progress.step, progress.seconds = step.index + 1, time.monotonic() - started
        seams.log("train", progress.step, step_figures(sums, step, session.schedule, seconds))
        if not applied(session.engine):
            _skip_or_stop(not_finite(session, step), progress, config.train.skip_nan)
        _after_step(session, progress, seams, stop)
        around.profiler.step_done()
        if progress.stopped:
            return
        asked = time.monotonic()


def _stream(session: Session, first: int) -> Iterator[StepBatches]:
    """The steps from `first` on, in rows of at most the session's budget; the pairs of a step do not depend on it."""
    schedule, runtime, budget = session.schedule, session.runtime, session.tokens_per_batch
    pairs = session.data.train
    plans = [
        session.epoch
        if epoch == 0 and budget == session.config.train.tokens_per_batch
        else plan_of_epoch(session.config, pairs.places, session.form, runtime.world, budget, epoch)
        for epoch in range(math.ceil(schedule.total_steps / schedule.steps_per_epoch))
    ]
    workers = 2 if runtime.device.type == "cuda" else 0
    last = schedule.total_steps
    return steps(pairs, plans, rank=runtime.row_rank, form=session.form, first=first, last=last, workers=workers)


def _prepared_step(session: Session, step: StepBatches, seams: Seams, around: Around) -> tuple[dict[str, float], bool]:
    for group in session.engine.optimizer.param_groups:
        group["lr"] = session.schedule.learning_rate(step.index)
    # what dropout draws follows from seed and step, so a resumed run draws the same
    drawn = session.config.train.seed * 1_000_003 + step.index * 1_009 + session.runtime.rank
    torch.manual_seed(drawn % 2**63)  # a seed may be as large as a number can be
    return train_step(session, step, around, stop=seams.stop_requested())


def _after_step(session: Session, progress: Progress, seams: Seams, stop: bool) -> None:
    """Evaluate, save and decide whether to stop, as the settings say for this step."""
    train, output, total = session.config.train, session.config.output, session.schedule.total_steps
    eval_every = output.eval_every or max(1, total // 10)
    last = progress.step == total
    evaluates = progress.step % eval_every == 0 or last
    progress.owes_evaluation = evaluates
    if stop or (evaluates and session.runtime.any(seams.stop_requested())):
        progress.stopped = "signal"
        seams.save(progress)  # before anything else: whoever asked may not wait for an evaluation
        return
    if evaluates:
        _evaluate_or_stop(session, progress, seams)
        if progress.stopped == "signal":
            return
    cut = False
    limits = ((train.max_hours, progress.seconds - session.seconds_before), (train.max_total_hours, progress.seconds))
    for hours, seconds in limits:
        if hours and session.runtime.any(seconds > hours * 3600):
            progress.stopped, cut = f"after {hours:g} hours, as asked", True
    due = output.save_every is not None and progress.step % output.save_every == 0
    later = cut and (output.save_every is not None or output.resume != "no")  # it may go on in its next hours
    if (due or later) and not last:
        seams.save(progress)


def smaller_budget(error: torch.OutOfMemoryError, session: Session) -> int:
    """Half the token budget after the memory ran out, if that was asked for and can help.

    Args:
        error: What torch said.
        session: The run.

    Raises:
        TrainingError: it was not, or rows are single pairs already, or other processes are in the middle of the step.
    """
    budget, train = session.tokens_per_batch, session.config.train
    places = session.data.train.places if session.form.layout == "shared" else session.data.train.places.unshared
    whole = int(places.unit_sizes(session.config.loss.ranking == "plackett-luce").tokens_I.max())
    longest = math.ceil(whole / session.config.distributed.sequence_parallel)
    advice = f"--tokens-per-batch {max(budget // 2, longest)}"
    if budget <= longest:
        advice = "--gradient-checkpointing, --deepspeed zero3-offload, --sequence-parallel or --max-length (a row is a "
        advice += "single pair already)"
    if not train.auto_budget or session.runtime.world > 1 or budget <= longest:
        more = "" if train.auto_budget else "; --auto-budget halves it by itself on one GPU"
        raise TrainingError(f"the GPU is out of memory ({first_line(error)}); try {advice}{more}") from error
    return max(budget // 2, longest)


def _discard_gradients(session: Session) -> None:
    """Throw away what a step has gathered so far, at every ZeRO stage.

    DeepSpeed itself clears the gradients of a step whose gradient is not finite and keeps the weights, so one pair with
    a loss of NaN does it without touching its internals.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pairs, engine = session.data.train, session.engine
    shortest = int(np.argmin(pairs.places.tokens_P))
    micro = build_micro_batch(pairs, np.array([shortest]), session.form).sent_to(session.runtime.device)
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(micro.batch).sum() * math.nan, scale_wrt_gas=False)
    engine.step()


def train_step(session: Session, step: StepBatches, around: Around, *, stop: bool) -> tuple[dict[str, float], bool]:
    """One optimiser step; returns the sums over the pairs of all processes, and whether one of them was asked to stop.

    A gradient that is not finite leaves the weights as they were (see `applied`).

    Args:
        session: The run; its engine's weights are changed.
        step: The micro-batches of this process, as many as on every other.
        around: Profiler and the place of activations.
        stop: Whether this process was asked to stop.

    Returns:
        Sums by the names of `metrics.FIELDS`, from the weights before the update, with the norm of the gradient before
        it was clipped (`metrics.NORM`); and whether to stop.
    """
    engine, runtime, config = session.engine, session.runtime, session.config
    sums = PairSums(runtime.device)
    last = len(step.micro_batches) - 1
    for i, micro in enumerate(step.micro_batches):
        with around.profiler.part("forward"), around.activations():
            loss = _micro_loss(engine, micro.to(runtime.device), config, sums)
        with around.profiler.part("backward"):
            engine.set_gradient_accumulation_boundary(i == last)
            engine.backward(loss * (runtime.world / step.total_weight), scale_wrt_gas=False)
    counted = sums if runtime.counts else PairSums(runtime.device)  # of those that share rows, one counts their pairs
    counted.add_stop(stop)
    totals = runtime.sum(counted.vector())
    with around.profiler.part("optimizer"):
        engine.step()
    values = named(totals, engine.get_global_grad_norm())  # the only time in a step that btrm waits for the GPU
    return values, values["asked_to_stop"] > 0


def applied(engine: Any) -> bool:
    """False if DeepSpeed found the gradient not finite and left the weights as they were (then it cleared it).

    Args:
        engine: The DeepSpeed engine, just after its step.
    """
    return not getattr(engine.optimizer, "overflow", False)


def not_finite(session: Session, step: StepBatches) -> str:
    """Say which pairs of a step have a reward that is not finite; all processes look at theirs.

    Args:
        session: The run; all processes take part, and its weights are those before the step.
        step: Computed once more, without gradients.

    Returns:
        One line, equal on every process, with the ids of at most five pairs.
    """
    engine, runtime, pairs = session.engine, session.runtime, session.data.train
    bad: list[str] = []
    with torch.no_grad():
        for micro in step.micro_batches:
            micro = micro.sent_to(runtime.device)
            chosen_P, rejected_P = micro.sides(engine(micro.batch))
            finite_P = (chosen_P.isfinite() & rejected_P.isfinite()).tolist()
            if runtime.counts:
                bad += [pairs.id(int(i)) for i, ok in zip(micro.pair_ids_P, finite_P, strict=False) if not ok]
    names = [name for part in gather(runtime, bad) for name in part]
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    where = f"rewards of these pairs are not finite: {some}" if names else "all rewards are finite, the gradient is not"
    return f"step {step.index + 1}: {where}"


def _micro_loss(engine: Any, micro: MicroBatch, config: RunConfig, sums: PairSums) -> torch.Tensor:
    """The weighted sum of the losses of a micro-batch; its figures are added to `sums`."""
    rewards_S = engine(micro.batch)
    chosen_P, rejected_P = micro.sides(rewards_S)
    if config.loss.ranking == "plackett-luce":
        ranking = (micro.ranking_R, micro.wins_R, micro.chosen_entry_P, micro.rejected_entry_P)
        rewards_R = rewards_S.index_select(0, micro.entry_R)
        loss_P = plackett_luce(rewards_R, *ranking, centering=config.loss.centering)
    else:
        loss_P = bradley_terry(
            chosen_P,
            rejected_P,
            margin_P=micro.margin_P if config.loss.margin else None,
            probability_P=micro.probability_P,
            label_smoothing=config.loss.label_smoothing,
            centering=config.loss.centering,
        )
    batch = micro.batch
    if len(micro.pair_ids_P):
        sums.add_pairs(chosen_P, rejected_P, loss_P, micro.weight_P, micro.probability_P)
        sums.add_tokens(computed=batch.computed, useful=batch.useful, shared=batch.shared)
    else:
        sums.add_tokens(computed=batch.computed, useful=0, shared=0)
    return (loss_P * micro.weight_P).sum()


def _evaluate_or_stop(session: Session, progress: Progress, seams: Seams) -> None:
    """Evaluate; asked to stop meanwhile, save instead: the evaluation is then owed by whoever goes on."""
    try:
        _evaluated(seams, progress, session.config)
    except AskedToStop:
        progress.stopped = "signal"
        seams.save(progress)
    else:
        progress.owes_evaluation = False


def _evaluated(seams: Seams, progress: Progress, config: RunConfig) -> None:
    figures = seams.evaluate(progress.step)
    if figures is None:
        return
    by, patience = config.output.best_by, config.train.early_stopping
    value = badness(figures, by)
    if value < progress.best_loss:
        progress.best_loss, progress.best_by = value, by
        progress.best_step, progress.evaluations_since_best = progress.step, 0
        seams.improved(progress, figures)
        return
    progress.evaluations_since_best += 1
    if patience is not None and progress.evaluations_since_best >= patience:
        told = "loss has not fallen" if by == "loss" else f"{by} has not become better"
        progress.stopped = f"{EARLY}: the evaluation {told} for {patience} evaluations"


def _skip_or_stop(reason: str, progress: Progress, skip: bool) -> None:
    if not skip:
        raise TrainingError(
            f"{reason}; the weights are as before this step. Lower --learning-rate, look at these pairs, or go on "
            "without such steps with --skip-nan"
        )
    progress.skipped_steps.append(progress.step)
