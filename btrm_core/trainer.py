"""The training loop: linear, the same for every family, exact for any split of a step.

Decides: what one optimiser step is, what is measured, when to evaluate, save and stop. The loss of a step is the sum over
its pairs divided by their total weight, whatever rows and processes they were put on: micro-batches contribute sums, and
DeepSpeed's mean over processes is multiplied away.

Shapes: P pairs, S sequences.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from btrm_core.distributed import Runtime
from btrm_core.encoded import EncodedPairs
from btrm_core.errors import TrainingError
from btrm_core.inference import make_plan
from btrm_core.loader import MicroBatch, RowForm, StepBatches, steps
from btrm_core.loss import bradley_terry
from btrm_core.metrics import PairSums, named, summarise, token_figures
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

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to zero (arXiv:1608.03983, equation 5, without restarts)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / span))


def schedule(config: RunConfig, steps_per_epoch: int) -> Schedule:
    """The schedule of a run whose settings are resolved."""
    train = config.train
    total = max(1, round(steps_per_epoch * (train.epochs or 1.0)))
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    return Schedule(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=math.ceil(total * (train.warmup_ratio or 0.0)),
        peak=float(train.learning_rate or 0.0),
    )


@dataclass
class Progress:
    """What changes while training, apart from weights and optimiser: all that a resumed run must know."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluations_since_best: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    stopped: str | None = None


@dataclass(frozen=True)
class Callables:
    """What the loop calls at its seams; each is one function, and each is called on every process."""

    log: Callable[[str, int, dict[str, Any]], None]
    """Write figures: split ("train" or "eval"), step, figures."""
    evaluate: Callable[[int], dict[str, Any] | None]
    """Evaluate the live model after a number of steps; None if there is nothing to evaluate on."""
    save: Callable[[Progress], None]
    """Save a resumable checkpoint."""
    stop_requested: Callable[[], bool]
    """True once this process was asked to stop (a signal)."""


def fit(
    engine: Any,
    pairs: EncodedPairs,
    config: RunConfig,
    runtime: Runtime,
    plan_of: Schedule,
    progress: Progress,
    calls: Callables,
    form: RowForm,
) -> Progress:
    """Train from `progress.step` to the end of the schedule, or until asked to stop.

    Args:
        engine: The DeepSpeed engine around the reward model.
        pairs: Encoded training pairs.
        config: Resolved settings.
        runtime: This process.
        plan_of: Steps and learning rates.
        progress: Where to start; changed in place and returned.
        calls: Logging, evaluation, saving and stopping.
        form: How rows are laid out.

    Raises:
        TrainingError: the loss or the gradient is not finite, and such steps are not to be skipped.
    """
    train, output = config.train, config.output
    plans = [
        make_plan(
            pairs,
            form,
            pairs_per_step=int(train.pairs_per_step or 1),
            tokens_per_batch=train.tokens_per_batch,
            world=runtime.world,
            seed=train.seed,
            epoch=epoch,
        )
        for epoch in range(math.ceil(plan_of.total_steps / plan_of.steps_per_epoch))
    ]
    eval_every = output.eval_every or max(1, plan_of.total_steps // 10)
    started, before = time.monotonic(), progress.seconds
    engine.train()
    stream = steps(
        pairs,
        plans,
        rank=runtime.rank,
        form=form,
        first=progress.step,
        last=plan_of.total_steps,
        workers=2 if runtime.device.type == "cuda" else 0,
    )
    for step in stream:
        step_started = time.monotonic()
        _set_learning_rate(engine, plan_of.learning_rate(step.index))
        torch.manual_seed(
            train.seed * 1_000_003 + step.index * 1_009 + runtime.rank
        )  # dropout, the same after a resume
        sums, stop = train_step(engine, step, config, runtime, stop=calls.stop_requested())
        progress.step = step.index + 1
        progress.seconds = before + time.monotonic() - started
        figures = step_figures(sums, engine, step, plan_of, time.monotonic() - step_started)
        calls.log("train", progress.step, figures)
        if not applied(engine):
            _skip_or_stop(not_finite(engine, step, pairs, runtime), progress, train.skip_nan)
        last = progress.step == plan_of.total_steps
        if progress.step % eval_every == 0 or last:
            _evaluated(calls.evaluate(progress.step), progress, train.early_stopping)
        if train.max_hours and runtime.any(progress.seconds > train.max_hours * 3600):
            progress.stopped = f"after {train.max_hours} hours, as asked"
        if stop:
            progress.stopped = "signal"
        if progress.stopped or (output.save_every and progress.step % output.save_every == 0 and not last):
            calls.save(progress)
        if progress.stopped:
            break
    return progress


def train_step(
    engine: Any, step: StepBatches, config: RunConfig, runtime: Runtime, *, stop: bool
) -> tuple[dict[str, float], bool]:
    """One optimiser step; returns the sums over the pairs of all processes, and whether one of them was asked to stop.

    A gradient that is not finite leaves the weights as they were (see `applied`).
    """
    sums = PairSums(runtime.device)
    last = len(step.micro_batches) - 1
    for i, micro in enumerate(step.micro_batches):
        moved = micro.to(runtime.device)
        loss = _micro_loss(engine, moved, config, sums)
        engine.set_gradient_accumulation_boundary(i == last)
        engine.backward(loss * (runtime.world / step.total_weight), scale_wrt_gas=False)
    flag = torch.tensor([float(stop)], dtype=torch.float64).to(runtime.device)
    totals = runtime.sum(torch.cat([sums.vector(), flag]))
    values = named(totals[:-1])
    engine.step()
    return values, bool(totals[-1].item() > 0)


def applied(engine: Any) -> bool:
    """False if DeepSpeed found the gradient not finite and left the weights as they were (then it cleared it)."""
    return not getattr(engine.optimizer, "overflow", False)


def not_finite(engine: Any, step: StepBatches, pairs: EncodedPairs, runtime: Runtime) -> str:
    """Say which pairs of a step have a reward that is not finite; all processes look at theirs."""
    bad: list[str] = []
    with torch.no_grad():
        for micro in step.micro_batches:
            rewards_P2 = engine(micro.to(runtime.device).batch).view(-1, 2)
            finite_P = torch.isfinite(rewards_P2).all(dim=1).tolist()
            bad += [pairs.id(int(i)) for i, ok in zip(micro.pair_ids_P, finite_P, strict=False) if not ok]
    found: list[list[str]] = [bad] * runtime.world
    if runtime.world > 1:
        torch.distributed.all_gather_object(found, bad)
    names = [name for part in found for name in part]
    some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    where = f"rewards of these pairs are not finite: {some}" if names else "all rewards are finite, the gradient is not"
    return f"step {step.index + 1}: {where}"


def _micro_loss(engine: Any, micro: MicroBatch, config: RunConfig, sums: PairSums) -> torch.Tensor:
    """The weighted sum of the losses of a micro-batch; its figures are added to `sums`."""
    rewards_P2 = engine(micro.batch).view(-1, 2)
    chosen_P, rejected_P = rewards_P2[:, 0], rewards_P2[:, 1]
    loss_P = bradley_terry(
        chosen_P,
        rejected_P,
        margin_P=micro.margin_P if config.loss.margin else None,
        label_smoothing=config.loss.label_smoothing,
        centering=config.loss.centering,
    )
    batch = micro.batch
    if len(micro.pair_ids_P):
        sums.add_pairs(chosen_P, rejected_P, loss_P, micro.weight_P)
        sums.add_tokens(computed=batch.computed, useful=batch.useful, shared=batch.shared)
    else:
        sums.add_tokens(computed=batch.computed, useful=0, shared=0)
    return (loss_P * micro.weight_P).sum()


def step_figures(
    sums: dict[str, float], engine: Any, step: StepBatches, plan_of: Schedule, seconds: float
) -> dict[str, Any]:
    """Everything logged of a training step, under stable names."""
    norm = engine.get_global_grad_norm()
    return {
        **summarise(sums),
        "grad_norm": float(norm) if norm is not None else math.nan,
        "learning_rate": plan_of.learning_rate(step.index),
        "epoch": (step.index + 1) / plan_of.steps_per_epoch,
        "seconds": seconds,
        **token_figures(sums, seconds),
        "rank_imbalance": step.rank_imbalance,
        "micro_batches": len(step.micro_batches),
        "peak_memory_gib": peak_memory_gib(),
    }


def peak_memory_gib() -> float:
    """Most memory this process has held: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _evaluated(figures: dict[str, Any] | None, progress: Progress, patience: int | None) -> None:
    if figures is None:
        return
    if figures["loss"] < progress.best_loss:
        progress.best_loss, progress.evaluations_since_best = figures["loss"], 0
        return
    progress.evaluations_since_best += 1
    if patience is not None and progress.evaluations_since_best >= patience:
        progress.stopped = f"early: the evaluation loss has not fallen for {patience} evaluations"


def _set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def _skip_or_stop(reason: str, progress: Progress, skip: bool) -> None:
    if not skip:
        raise TrainingError(
            f"{reason}; the weights are as before this step. Lower --learning-rate, look at these pairs, or go on without "
            "such steps with --set train.skip_nan=true"
        )
    progress.skipped_steps.append(progress.step)
