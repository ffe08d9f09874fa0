"""Training from beginning to end; read this first: each line is one module.

`train` is what `btrm train` calls, and what a script calls that wants a reward model.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btrm_core import agreement, checkpoint, distributed, resume
from btrm_core.distributed import Runtime
from btrm_core.evaluate import figures_of
from btrm_core.inference import make_plan, pair_rewards
from btrm_core.interrupt import Interrupt, output_lock
from btrm_core.loader import RowForm
from btrm_core.planner import Plan
from btrm_core.prepare import (
    Data,
    build_model,
    check_first,
    choose,
    device_name,
    load_data,
    make_engine,
    output_directory,
    usable_form,
)
from btrm_core.profiling import Profiler
from btrm_core.report import Reporter, say, trackers
from btrm_core.saving import Session, save_model
from btrm_core.schedule import Progress, schedule
from btrm_core.settings import RunConfig
from btrm_core.summary import describe_run, introduce
from btrm_core.trainer import Callables, fit
from btrm_core.utilisation import mfu_per_token_rate

EXAMPLES = 3


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


def train(config: RunConfig) -> Outcome:
    """Train a reward model as `config` says and save it; returns where it is and how good it is.

    Raises:
        BtrmError: a subclass says what the user can put right; no half-written model is left.
    """
    distributed.quiet()
    with distributed.group(config):
        family, config, chat = choose(config)
        output = output_directory(config, family)
        checkpoint.refuse_overwrite(output / "model", config.output.overwrite)
        resume.refuse_restart(output, config.output.resume, config.output.overwrite)
    loggers = trackers(config.output.report_to)
    with (
        distributed.start(config, loggers, str(output)) as runtime,
        output_lock(output, runtime.is_main),
        Interrupt() as interrupt,
    ):
        agreement.agree(runtime, agreement.software(config, family))
        check_output(config, output, runtime)
        data = load_data(config, chat, runtime)
        fingerprints = {"data": data.report["fingerprint"], "chat template": chat.template_sha256}
        same = {**fingerprints, "encoded pairs": data.train.folder.name}
        agreement.agree(runtime, {name: value[:12] for name, value in same.items()})
        model, head_is_new = build_model(config, family, chat, runtime)
        engine = make_engine(model, config, runtime)
        form = usable_form(config, engine, data, runtime, chat.pad_id)
        made = plan_of_epoch(config, data, form, runtime.world)
        plan = schedule(config, made.num_steps)
        introduce(config, family, chat, data, made, plan, runtime, form)
        who = resume.identity(config, fingerprints, runtime)
        progress = begin(engine, config, data, runtime, output, form, head_is_new, who)
        reporter = Reporter(runtime, output, plan.total_steps, progress.step, config)
        session = Session(config, family, chat, runtime, data, engine, form, plan, output, reporter)
        try:
            seams, profiler = calls(session, interrupt, who), profiler_of(session)
            progress = fit(engine, data.train, config, runtime, plan, progress, seams, form, profiler)
            return finish(session, progress, interrupt)
        except OSError as error:
            if checkpoint.disk_is_full(error):
                raise checkpoint.explained(error, output) from error
            raise
        finally:
            engine.destroy()
            reporter.close()


def check_output(config: RunConfig, output: Path, runtime: Runtime) -> None:
    """Find out before the first step whether all processes can write their parts of a checkpoint."""
    if config.output.save_every is not None or config.output.resume != "no":
        agreement.require_shared(output, runtime)
    elif alone := agreement.strangers(output, runtime):
        say(runtime, f"{alone}: this run cannot save a checkpoint when it is asked to stop")


def plan_of_epoch(config: RunConfig, data: Data, form: RowForm, world: int) -> Plan:
    """The plan of the first epoch."""
    return make_plan(
        data.train,
        form,
        pairs_per_step=int(config.train.pairs_per_step or 1),
        tokens_per_batch=config.train.tokens_per_batch,
        world=world,
        seed=config.train.seed,
        epoch=0,
    )


def begin(
    engine: Any,
    config: RunConfig,
    data: Data,
    runtime: Runtime,
    output: Path,
    form: RowForm,
    head_is_new: bool,
    who: dict[str, Any],
) -> Progress:
    """Start anew, after checking the first loss of a new head, or go on from a checkpoint."""
    if runtime.is_main:
        resume.clean(output / "resume")
        if config.output.resume == "no":
            resume.forget(output)
    directory, speak = output / "resume", lambda text: say(runtime, text)
    found = resume.find(config.output.resume, directory, runtime, speak)
    if found is not None:
        progress = resume.load(engine, found, who, runtime, directory, config.output, speak)
        if runtime.is_main:
            resume.rewind(output / "metrics.jsonl", progress.step)
        say(runtime, f"resuming from {found} after step {progress.step}")
        return progress
    if config.output.resume != "no":
        say(runtime, f"no complete checkpoint in {output / 'resume'}: beginning anew")
    if head_is_new:
        loss = check_first(engine, data, config, runtime, form)
        say(runtime, f"loss before the first step {loss:.4f} (ln 2 = 0.6931)")
    else:
        say(runtime, "the base model brings its own reward head; training goes on with it")
    return Progress()


def calls(session: Session, interrupt: Interrupt, who: dict[str, Any]) -> Callables:
    """The seams of the training loop for this run."""
    config, runtime, output = session.config, session.runtime, session.output

    def save(progress: Progress) -> None:
        def write_model(directory: Path) -> None:
            save_model(session, progress, None, directory)

        keep = config.output.keep_last
        path = resume.save(session.engine, progress, runtime, output / "resume", who, keep, write_model)
        say(runtime, f"step {progress.step}: checkpoint saved in {path}")

    def evaluate(step: int) -> dict[str, Any] | None:
        figures = evaluate_now(session, step)
        if figures is not None:
            session.reporter.log("eval", step, figures)
        return figures

    def improved(progress: Progress, figures: dict[str, Any]) -> None:
        if config.output.keep_best:
            save_model(session, progress, figures, output / "best")

    rate = mfu_rate(session)

    def log(split: str, step: int, figures: dict[str, Any]) -> None:
        if split == "train" and rate is not None:
            figures["mfu_percent"] = rate * figures["tokens_per_second"]
        session.reporter.log(split, step, figures)

    return Callables(
        log=log,
        evaluate=evaluate,
        improved=improved,
        save=save,
        stop_requested=interrupt.requested,
        say=lambda text: say(runtime, text),
    )


def profiler_of(session: Session) -> Profiler:
    """Measures some steps of the main process, if that is asked for."""
    wanted = session.config.output.profile and session.runtime.is_main
    return Profiler(session.output if wanted else None, lambda text: say(session.runtime, text))


def mfu_rate(session: Session) -> float | None:
    """What `tokens_per_second` is multiplied with for the MFU; None on a CPU."""
    runtime, pairs = session.runtime, session.data.train
    if runtime.device.type != "cuda":
        return None
    length = float((pairs.shared_P + (pairs.chosen_P + pairs.rejected_P) / 2).mean())
    config = session.engine.module.base_model.config
    name = device_name(runtime.device)
    return mfu_per_token_rate(config, name, runtime.world, length, session.config.lora.rank)


def evaluate_now(session: Session, step: int) -> dict[str, Any] | None:
    """Evaluate the live model after a step, once; None if there are no pairs to evaluate on."""
    pairs = session.data.eval
    if pairs is None:
        return None
    if session.evaluated is None or session.evaluated[0] != step:
        budget = session.config.train.tokens_per_batch
        rewards_P2 = pair_rewards(session.engine, pairs, session.runtime, session.form, tokens_per_batch=budget)
        session.evaluated = (step, rewards_P2)
    return figures_of(pairs, session.evaluated[1])


def finish(session: Session, progress: Progress, interrupt: Interrupt) -> Outcome:
    """Save the model and say how good it is; a run stopped by a signal only says how to go on."""
    session.reporter.bar.close()
    if progress.stopped == "signal":
        say(session.runtime, f"stopped after step {progress.step}; go on with the same command and --resume")
        return Outcome(None, None, progress, interrupt.signal or 0)
    evaluation = evaluate_now(session, progress.step)
    shown = examples(session.data, session.evaluated[1]) if session.evaluated else ()
    directory = session.output / "model"
    best = session.output / "best"
    main = session.runtime.is_main  # the others need not see the directory
    if session.config.output.keep_best and session.runtime.any(main and checkpoint.is_finished(best)):
        if main:
            evaluation = checkpoint.read_manifest(best)["evaluation"]
            checkpoint.publish(best, directory)
        session.runtime.barrier()
    else:
        save_model(session, progress, evaluation, directory)
    if progress.stopped:
        say(session.runtime, f"stopped {progress.stopped}")
    return Outcome(directory, evaluation, progress, examples=shown)


def examples(data: Data, rewards_P2: np.ndarray) -> tuple[dict[str, Any], ...]:
    """The first held-out pairs with their rewards, to be shown to a person."""
    if data.eval is None or data.eval_rows is None:
        return ()
    shown = []
    for i in range(min(EXAMPLES, len(data.eval))):
        pair = data.eval_rows[int(data.eval.index_P[i])]
        chosen, rejected = (float(r) for r in rewards_P2[i])
        question = pair.prompt[-1]["content"] if pair.prompt else ""
        shown.append({"prompt": question, "chosen": (chosen, pair.chosen), "rejected": (rejected, pair.rejected)})
    return tuple(shown)


def dry_run(config: RunConfig) -> str:
    """Everything a run would do, resolved, as text; nothing is trained, and nothing written but the data's cache."""
    family, config, chat = choose(config)
    data = load_data(config, chat)
    form = RowForm(config.train.layout, config.model.attention, 1, chat.pad_id)
    made = plan_of_epoch(config, data, form, world=1)
    plan = schedule(config, made.num_steps)
    return describe_run(config, family, chat, data, made, plan, output_directory(config, family))
