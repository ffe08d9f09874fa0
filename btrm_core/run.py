"""Training from beginning to end; read this first: each line of `train` is one package.

`train` is what `btrm train` calls, and what a script calls that wants a reward model.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from btrm_core.config import keeps_best
from btrm_core.console import say
from btrm_core.errors import CheckpointError
from btrm_core.evaluation import NoRewardsError, badness
from btrm_core.files import disk_is_full, explained, output_lock, probe
from btrm_core.hub import prepare_upload
from btrm_core.model import build_model, is_finished, read_manifest, refuse_overwrite
from btrm_core.settings import RunConfig
from btrm_core.signals import stopping_at_once
from btrm_core.training import (
    AskedToStop,
    Data,
    Job,
    Outcome,
    Progress,
    Reporter,
    Schedule,
    Session,
    check_first,
    check_room,
    choose,
    describe_run,
    evaluate_now,
    examples,
    expected_form,
    fingerprints,
    fit,
    held_out_rewards,
    identity,
    introduce,
    load_data,
    plan_of_epoch,
    publish_best,
    resume,
    save_run,
    seams,
    settings_changed,
    start_engine,
    trackers,
    usable_form,
)
from btrm_core.training.processes import (
    Interrupt,
    Runtime,
    agree,
    check_shares,
    group,
    is_main_process,
    quiet,
    require_shared,
    software,
    start,
    strangers,
)


def train(config: RunConfig) -> Outcome:
    """Train a reward model as `config` says and save it; returns where it is and how good it is.

    Args:
        config: The settings; what they leave open is filled by the family's recipe.

    Raises:
        BtrmError: a subclass says what the user can put right; no half-written model is left.
    """
    # until the first step a signal stops at once: nothing is there yet that could be saved
    with stopping_at_once(), group(config):  # processes: they find each other, and a failure of one ends all
        job = choose(config)  # families, chat: who answers; the settings resolved
        with (
            claim_output(job) as output,
            start(job.config, trackers(job.config.output.report_to), str(output)) as runtime,
        ):
            agree(runtime, software(job.config, job.family))  # all machines have the same versions and settings
            check_output(job, runtime)
            data = load_data(job.config, job.chat, runtime)  # data: checked pairs and their tokens
            agree(runtime, fingerprints(job, data))
            if (done := finished_before(job, data, runtime)) is not None:
                return done
            model, head_is_new = build_model(job.config, job.family, job.chat, runtime.dtype, runtime.device)
            with start_engine(model, job.config, runtime) as engine:  # training: DeepSpeed around the model
                form = usable_form(job, model, data, runtime)  # packing: packed rows, or padded ones and why
                budget, places = job.config.train.tokens_per_batch, data.train.places
                epoch = plan_of_epoch(job.config, places, form, runtime.world, budget)
                schedule = Schedule.of(job.config, epoch.num_steps)
                with contextlib.closing(Reporter(runtime, output, job.config)) as reporter:
                    session = Session(job, runtime, data, engine, form, epoch, schedule, reporter)
                    introduce(session)
                    progress = begin(session, head_is_new)  # a checkpoint, or the first loss of a new head
                    with Interrupt() as interrupt:  # from here on a signal saves first
                        progress = fit(session, progress, seams(session, interrupt))
                        return finish(session, progress, interrupt)


@contextlib.contextmanager
def claim_output(job: Job) -> Iterator[Path]:
    """Hold the output directory for this run alone, and refuse one that would be overwritten.

    Args:
        job: what is to be run; its `output` is the directory.

    Yields:
        The output directory.

    Raises:
        CheckpointError: another run holds it; a finished model or checkpoints are there and it is not said what becomes
            of them; or the disk is full while the run lasts.
    """
    output = job.output
    with output_lock(output, is_main_process()):  # before looking: two starts may come at once
        _may_write(job)
        try:
            yield output
        except OSError as error:
            if disk_is_full(error):
                raise explained(error, output) from error
            raise


LENGTH = ("epochs", "max_steps", "pairs_per_step", "early_stopping")
"""Settings of training that say how long a run is: with others it goes on."""


def finished_before(job: Job, data: Data, runtime: Runtime) -> Outcome | None:
    """What a run that is to be resumed has left, if it is done: same data, same length, its model in place.

    Args:
        job: what is to be run.
        data: the data it would train on, for the fingerprint.
        runtime: the processes of the run; all must call this.

    Returns:
        The outcome of the finished run; None if there is something left to do.

    Raises:
        CheckpointError: the model that is there is of other data or settings, and would be replaced from the beginning.
    """
    output, there = job.config.output, job.output / "model"
    made = read_manifest(there) if output.resume != "no" and runtime.is_main else {}
    settings, training = made.get("config", {}), made.get("training", {})
    others = settings_changed(settings, job.config) if made else []
    before = made.get("data", {})
    key = "training_pairs" if "training_pairs" in before else "fingerprint"  # which an earlier version knew alone
    if made and before.get(key) != data.report[key]:
        others.insert(0, "the training data is another")
    now = job.config.train
    done = training.get("finished", False) and all(settings.get(f"train.{k}") == getattr(now, k) for k in LENGTH)
    if (
        others
        and (done or not resume.complete(job.output / "resume"))
        and not (output.overwrite or output.force_resume)
    ):
        raise CheckpointError(
            f"--resume: the model in {there} was made otherwise ({'; '.join(others)}); use the data and settings of "
            "before, choose another --output, or begin anew with --overwrite"
        )
    if not runtime.any(done and not others):
        return None
    say(runtime, f"this run is finished ({training.get('steps')} steps); --epochs N or --max-steps N makes it longer")
    progress = Progress(step=training.get("steps", 0), seconds=training.get("seconds", 0.0))
    return Outcome(job.output / "model", made.get("evaluation"), progress)


def _may_write(job: Job) -> None:
    """Refuse an output directory that would be overwritten."""
    output, settings = job.output, job.config.output
    refuse_overwrite(output / "model", settings.overwrite or settings.resume != "no")
    resume.refuse_restart(output, settings.resume, settings.overwrite)


def check_output(job: Job, runtime: Runtime) -> None:
    """Find out before the first step whether a hub takes the model, and all processes can write their checkpoints.

    Args:
        job: what is to be run.
        runtime: the processes of the run; all must call this.

    Raises:
        CheckpointError: one cannot, and checkpoints are asked for.
        ConfigError: the hub does not take a model from here.
    """
    output = job.config.output
    if output.push_to is not None and runtime.is_main:
        prepare_upload(output.push_to, private=output.private)
    if output.save_every is not None or output.resume != "no":
        require_shared(job.output, runtime)
    elif alone := strangers(job.output, runtime):
        say(runtime, f"{alone}: this run cannot save a checkpoint when it is asked to stop")


def begin(session: Session, head_is_new: bool) -> Progress:
    """Go on from a checkpoint, or start anew after checking the first loss of a new head.

    Args:
        session: the run, model and data loaded; gets its `identity` here.
        head_is_new: the reward head was made for this run, so its first loss is compared with ln 2.

    Returns:
        Where training goes on.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of other data or settings, or the disk lacks the room.
        TrainingError: first rewards of a new head are not finite, all zero, or the same within every pair.
    """
    runtime, settings, output = session.runtime, session.config.output, session.job.output
    session.identity = identity(session)
    if runtime.is_main:
        check_room(session, probe(output))
    if runtime.is_main:
        resume.clean(output / "resume")
        if settings.resume == "no":
            resume.forget(output)
    found = resume.find(settings.resume, output / "resume", runtime)
    if found is not None:
        progress = resume.load(session, found)
        if runtime.is_main:
            resume.rewind(output / "metrics.jsonl", progress.step, owes_evaluation=progress.owes_evaluation)
        say(runtime, f"resuming from {found} after step {progress.step}")
    else:
        progress = Progress()
        if settings.resume != "no":
            say(runtime, f"no complete checkpoint in {output / 'resume'}: beginning anew")
        if head_is_new:
            say(runtime, f"loss before the first step {check_first(session):.4f} (ln 2 = 0.6931)")
        else:
            say(runtime, "the base model brings its own reward head; training goes on with it")
    if session.reporter is not None:
        session.reporter.open(session.schedule.total_steps, progress.step)
    return progress


def finish(session: Session, progress: Progress, interrupt: Interrupt) -> Outcome:
    """Save the model and say how good it is; a run stopped by a signal only says how to go on.

    Args:
        session: the run.
        progress: how far training came, and what stopped it if anything did.
        interrupt: the signal, if one came.

    Returns:
        The model's directory and evaluation; both None, with the signal's number, after a signal.
    """
    runtime, output = session.runtime, session.job.output
    if session.reporter is not None:
        session.reporter.close_bar()
    evaluation, broken = None, None
    if progress.stopped != "signal":
        try:  # also of a run that was stopped between two evaluations
            evaluation = evaluate_now(session, progress.step, interrupt.requested)
        except AskedToStop:
            progress.stopped = "signal"
            seams(session, interrupt).save(progress)
        except NoRewardsError as error:
            broken = error
    if progress.stopped == "signal":
        say(runtime, f"stopped after step {progress.step}; go on with the same command and --resume")
        return Outcome(None, None, progress, interrupt.signal or 0)
    shown = examples(session)
    rewards_P2 = None if session.evaluated is None else session.evaluated[1]
    directory, best = output / "model", output / "best"
    by, done = session.config.output.best_by, progress.is_done(session.schedule.total_steps)
    worse = broken is not None or (evaluation is not None and progress.best_loss < badness(evaluation, by))
    kept = keeps_best(session.config) and worse
    if kept and runtime.any(runtime.is_main and is_finished(best)):  # the others need not see the directory
        shown, rewards_P2 = session.best_examples, session.best_rewards_P2
        if runtime.is_main:
            evaluation = publish_best(best, directory, done=done)
        runtime.barrier()
    elif broken:
        raise broken
    else:
        save_run(session, progress, evaluation, directory, interrupt.requested)
        if runtime.is_main and done:
            shutil.rmtree(best, ignore_errors=True)
    if progress.stopped:
        say(runtime, f"stopped {progress.stopped}")
    rewards = held_out_rewards(session, directory, rewards_P2)
    return Outcome(directory, evaluation, progress, examples=shown, held_out=rewards)


def dry_run(config: RunConfig, processes: int = 1) -> str:
    """Everything a run would do, resolved, as text; nothing is trained, and nothing written but the data's cache.

    Args:
        config: The settings.
        processes: How many processes the run would have.

    Raises:
        BtrmError: as `train`, as far as it can be known without the weights.
    """
    quiet()
    check_shares(config, processes)
    job = choose(config)
    _may_write(job)
    data = load_data(job.config, job.chat)
    budget, places = job.config.train.tokens_per_batch, data.train.places
    epoch = plan_of_epoch(job.config, places, expected_form(job), processes, budget)
    return describe_run(job, data, epoch, Schedule.of(job.config, epoch.num_steps))
