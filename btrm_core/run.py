"""Training from beginning to end; read this first: each line is one module.

`train` is what `btrm train` calls, and what a script calls that wants a reward model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from btrm_core import files
from btrm_core.console import say
from btrm_core.files import output_lock
from btrm_core.model import build_model, is_finished, read_manifest, refuse_overwrite
from btrm_core.packing import EpochPlan, RowForm, make_plan
from btrm_core.settings import RunConfig
from btrm_core.training import (
    Data,
    Outcome,
    Progress,
    Reporter,
    Session,
    calls,
    check_first,
    choose,
    clean,
    describe_run,
    evaluate_now,
    examples,
    find,
    fit,
    forget,
    identity,
    introduce,
    load,
    load_data,
    make_engine,
    output_directory,
    profiler_of,
    refuse_restart,
    rewind,
    save_run,
    schedule,
    trackers,
    usable_form,
)
from btrm_core.training.processes import (
    Interrupt,
    Runtime,
    agree,
    group,
    quiet,
    require_shared,
    software,
    start,
    strangers,
)


def train(config: RunConfig) -> Outcome:
    """Train a reward model as `config` says and save it; returns where it is and how good it is.

    Raises:
        BtrmError: a subclass says what the user can put right; no half-written model is left.
    """
    quiet()
    with group(config):
        family, config, chat = choose(config)
        output = output_directory(config, family)
        refuse_overwrite(output / "model", config.output.overwrite)
        refuse_restart(output, config.output.resume, config.output.overwrite)
    loggers = trackers(config.output.report_to)
    with (
        start(config, loggers, str(output)) as runtime,
        output_lock(output, runtime.is_main),
        Interrupt() as interrupt,
    ):
        agree(runtime, software(config, family))
        check_output(config, output, runtime)
        data = load_data(config, chat, runtime)
        fingerprints = {"data": data.report["fingerprint"], "chat template": chat.template_sha256}
        same = {**fingerprints, "encoded pairs": data.train.folder.name}
        agree(runtime, {name: value[:12] for name, value in same.items()})
        model, head_is_new = build_model(config, family, chat, runtime.dtype, runtime.device)
        engine = make_engine(model, config, runtime)
        form = usable_form(config, engine, data, runtime, chat.pad_id)
        made = plan_of_epoch(config, data, form, runtime.world)
        plan = schedule(config, made.num_steps)
        introduce(config, family, chat, data, made, plan, runtime, form)
        who = identity(config, fingerprints, runtime)
        progress = begin(engine, config, data, runtime, output, form, head_is_new, who)
        reporter = Reporter(runtime, output, plan.total_steps, progress.step, config)
        session = Session(config, family, chat, runtime, data, engine, form, plan, output, reporter)
        try:
            seams, profiler = calls(session, interrupt, who), profiler_of(session)
            progress = fit(engine, data.train, config, runtime, plan, progress, seams, form, profiler)
            return finish(session, progress, interrupt)
        except OSError as error:
            if files.disk_is_full(error):
                raise files.explained(error, output) from error
            raise
        finally:
            engine.destroy()
            reporter.close()


def check_output(config: RunConfig, output: Path, runtime: Runtime) -> None:
    """Find out before the first step whether all processes can write their parts of a checkpoint."""
    if config.output.save_every is not None or config.output.resume != "no":
        require_shared(output, runtime)
    elif alone := strangers(output, runtime):
        say(runtime, f"{alone}: this run cannot save a checkpoint when it is asked to stop")


def plan_of_epoch(config: RunConfig, data: Data, form: RowForm, world: int) -> EpochPlan:
    """The plan of the first epoch."""
    return make_plan(
        data.train.groups.lengths,
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
        clean(output / "resume")
        if config.output.resume == "no":
            forget(output)
    directory, speak = output / "resume", lambda text: say(runtime, text)
    found = find(config.output.resume, directory, runtime, speak)
    if found is not None:
        progress = load(engine, found, who, runtime, directory, config.output, speak)
        if runtime.is_main:
            rewind(output / "metrics.jsonl", progress.step)
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
    if session.config.output.keep_best and session.runtime.any(main and is_finished(best)):
        if main:
            evaluation = read_manifest(best)["evaluation"]
            files.publish(best, directory)
        session.runtime.barrier()
    else:
        save_run(session, progress, evaluation, directory)
    if progress.stopped:
        say(session.runtime, f"stopped {progress.stopped}")
    return Outcome(directory, evaluation, progress, examples=shown)


def dry_run(config: RunConfig) -> str:
    """Everything a run would do, resolved, as text; nothing is trained, and nothing written but the data's cache."""
    family, config, chat = choose(config)
    data = load_data(config, chat)
    form = RowForm(config.train.layout, config.model.attention, 1, chat.pad_id)
    made = plan_of_epoch(config, data, form, world=1)
    plan = schedule(config, made.num_steps)
    return describe_run(config, family, chat, data, made, plan, output_directory(config, family))
