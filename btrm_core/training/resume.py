"""Resumable checkpoints: weights, optimiser and position of a run, each complete or not there at all.

Decides: where they lie (`resume/step-N` in the output directory), when one counts, whether it is undamaged, and when a
run may go on from one. The order of the data needs no state: it follows from the seed and the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from btrm_core.config import keeps_best
from btrm_core.console import LongWork, say
from btrm_core.errors import CheckpointError, first_line
from btrm_core.files import PROBE, explained, publish, sweep
from btrm_core.training import reshard
from btrm_core.training.identity import EVALUATION, PROCESSES, refuse_changes
from btrm_core.training.processes import Runtime, gather, require_shared
from btrm_core.training.saving import bring_back_best
from btrm_core.training.schedule import Progress, Schedule
from btrm_core.training.session import Session

COMPLETE = "COMPLETE"


STATE = "state"


RECORD = "trainer.json"


def save(session: Session, progress: Progress, write_model: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step; all processes take part, and it counts only when all have finished.

    It holds DeepSpeed's state and, in `model/`, the model as transformers reads it.

    Args:
        session: The run.
        progress: Where it stands.
        write_model: Writes the model to a directory.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the disk is full or cannot be written, or not all processes see it; the checkpoint before is
            still there.
    """
    runtime, directory = session.runtime, session.job.output / "resume"
    target = directory / f"step-{progress.step:08d}"
    staging = directory / f".{target.name}.tmp"
    try:
        if runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        require_shared(directory, runtime)
        session.engine.save_checkpoint(str(staging), tag=STATE, save_latest=False)
        write_model(staging / "model")
        runtime.barrier()
        files = digests(staging, runtime)
        if runtime.is_main:
            state = {
                "progress": dataclasses.asdict(progress),
                "schedule": dataclasses.asdict(session.schedule),
                "identity": session.identity,
                "files": files,
            }
            text = json.dumps(state, indent=1)
            (staging / RECORD).write_text(text, encoding="utf-8")
            (staging / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest(), encoding="utf-8")
            publish(staging, target)
            _prune(directory, session.config.output.keep_last)
    except Exception as error:
        if runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise explained(error, target) from error
    runtime.barrier()
    return target


def digests(directory: Path, runtime: Runtime) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file by its path in `directory`, on every process; they share the reading.

    Args:
        directory: A checkpoint that all processes see; nobody writes to it meanwhile.
        runtime: This process; all take part.

    Returns:
        Path -> [bytes, 64 hexadecimal digits].
    """
    paths = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    mine = {}
    with LongWork(f"reading the files of {directory}"):
        for path in paths[runtime.rank :: runtime.world]:
            with (directory / path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                mine[path] = [os.fstat(file.fileno()).st_size, digest]
    return {path: entry for part in gather(runtime, mine) for path, entry in part.items()}


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first.

    Args:
        directory: Where the checkpoints of a run lie; it may be missing.
    """
    return sorted(path.parent for path in directory.glob(f"step-*/{COMPLETE}"))


def clean(directory: Path) -> None:
    """Remove what a run that was ended while it saved or converted has left; nobody else may be writing there.

    Args:
        directory: Where its checkpoints lie; their run's directory is above.
    """
    unfinished = [path for path in directory.glob("step-*") if not (path / COMPLETE).exists()]
    beside = [*directory.parent.glob(".best-*"), *directory.parent.glob(".model-*")]
    for left in (*directory.glob(".step-*"), *unfinished, *beside):
        shutil.rmtree(left, ignore_errors=True)
    sweep(directory.parent)
    for probe in directory.parent.glob(f"{PROBE}*"):
        probe.unlink(missing_ok=True)


def refuse_restart(output: Path, resume: str, overwrite: bool) -> None:
    """Raise rather than begin anew where a stopped run has left checkpoints; with `overwrite` a new run removes them.

    Args:
        output: The run's output directory.
        resume: What `--resume` says; "no" begins anew.
        overwrite: Whether what is there may go.

    Raises:
        CheckpointError: there are such checkpoints, and it is not said what becomes of them.
    """
    left = complete(output / "resume")
    if resume == "no" and left and not overwrite:
        raise CheckpointError(
            f"{output / 'resume'} holds checkpoints of an earlier run (the last: {left[-1].name}); go on from it with "
            "--resume, begin anew with --overwrite, or choose another --output"
        )


def forget(output: Path) -> None:
    """Remove what an earlier run has left in the output directory of a run that begins anew.

    Args:
        output: The run's output directory; its checkpoints and its best model go, the finished model stays.
    """
    for left in ("resume", "best"):
        shutil.rmtree(output / left, ignore_errors=True)


def find(resume: str, directory: Path, runtime: Runtime) -> Path | None:
    """The undamaged checkpoint a `--resume` value means, found by all processes together; None means to begin anew.

    Args:
        resume: "no"; "auto", the newest one; "latest-good", the newest undamaged one; or a checkpoint's directory.
        directory: Where the checkpoints of the run lie.
        runtime: This process.

    Raises:
        CheckpointError: the checkpoint asked for is not there, is not complete, or is damaged.
    """
    if resume == "no":
        return None
    if resume in ("auto", "latest-good"):
        there = complete(directory)
        for path in reversed(there):
            damage = damaged(path, runtime)
            if damage is None:
                return path
            if resume == "auto":
                raise CheckpointError(f"{damage}; --resume latest-good goes on from the newest undamaged checkpoint")
            say(runtime, f"{damage}; looking at the one before")
        if there:
            raise CheckpointError(f"every checkpoint in {directory} is damaged; without --resume training begins anew")
        return None
    path = Path(resume).expanduser()
    if not (path / COMPLETE).exists():
        near = [step for place in (path, path / "resume", directory) for step in complete(place)[-1:]]
        told = f"did you mean {near[0]}?" if near else f"--resume alone takes the newest in {directory}"
        raise CheckpointError(f"--resume {resume}: there is no complete checkpoint (no file {COMPLETE} in it); {told}")
    damage = damaged(path, runtime)
    if damage is not None:
        raise CheckpointError(damage)
    return path


def damaged(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with the files of a checkpoint, as one line on every process; None if they are as written.

    Args:
        path: A complete checkpoint.
        runtime: This process; all take part, each reading some of the files.
    """
    try:
        text = (path / RECORD).read_text(encoding="utf-8")
        written = json.loads(text)["files"]
        recorded = (path / COMPLETE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"the checkpoint {path} is damaged: {RECORD} cannot be read ({error})"
    if recorded and recorded != hashlib.sha256(text.encode()).hexdigest():  # it was empty in earlier versions
        return f"the checkpoint {path} is damaged: the content of {RECORD} has changed since it was written"
    found = digests(path, runtime)
    for name, (size, digest) in written.items():
        if name not in found:
            return f"the checkpoint {path} is damaged: {name} is missing"
        if found[name][0] != size:
            return f"the checkpoint {path} is damaged: {name} has {found[name][0]} bytes, expected {size}"
        if found[name][1] != digest:
            return f"the checkpoint {path} is damaged: the content of {name} has changed since it was written"
    return None


def load(session: Session, path: Path) -> Progress:
    """Put weights and optimiser back as they were, and return where the run stood; all processes take part.

    `--force-resume` allows other data and settings; `--restart-optimizer` leaves the optimiser's state as it is, new,
    and so allows another ZeRO stage. A checkpoint of another number of processes is converted meanwhile, in a copy
    beside this run's own checkpoints.

    Args:
        session: The run, its engine new.
        path: An undamaged checkpoint, of any number of processes; it is only read.

    Returns:
        Where the run stood.

    Raises:
        CheckpointError: data or settings differ (each difference is named) and are not forced; the ZeRO stage or the
            kind of optimiser differs and it is not to begin anew; or DeepSpeed cannot read its files.
    """
    state = json.loads((path / RECORD).read_text(encoding="utf-8"))
    before, who, output = state["identity"], session.identity, session.config.output
    refuse_changes(path, before, who, output)
    with LongWork(f"loading the checkpoint {path}"):
        _load_state(session, path, before)
    progress = Progress(**{**state["progress"], "stopped": None})
    _tell_new_schedule(session, progress, state.get("schedule"))
    _forget_what_is_gone(session, progress, same_evaluation=before.get(EVALUATION) in (None, who[EVALUATION]))
    return progress


def _load_state(session: Session, path: Path, before: dict[str, Any]) -> None:
    """Put DeepSpeed's state back, of a run of the identity `before`."""
    who, output = session.identity, session.config.output
    engine, runtime = session.engine, session.runtime
    try:
        if output.restart_optimizer:
            say(runtime, "--restart-optimizer: weights and position from the checkpoint, a fresh optimiser")
            reshard.load_weights(engine, path / STATE, runtime)
        elif before[PROCESSES] != who[PROCESSES]:
            place = session.job.output / "resume" / f".{path.name}.universal"
            change = f"{before[PROCESSES]} -> {who[PROCESSES]}"
            say(runtime, f"{PROCESSES}: {change}; converting the checkpoint in {place} meanwhile")
            reshard.load_resharded(engine, path / STATE, place, runtime)
        else:
            with reshard.plainly_named(path) as link:
                engine.load_checkpoint(str(link), tag=STATE)
    except CheckpointError:
        raise
    except Exception as error:
        advice = "" if output.restart_optimizer else "; --restart-optimizer takes its weights alone"
        raise CheckpointError(f"the checkpoint {path} cannot be loaded: {first_line(error)}{advice}") from error


def _tell_new_schedule(session: Session, progress: Progress, before: dict[str, Any] | None) -> None:
    """Say what becomes of the learning rate where the run has been made longer or shorter."""
    now = session.schedule
    if before is None or (old := Schedule(**before)) == now or progress.step >= now.total_steps:
        return
    rate = old.learning_rate(min(progress.step, old.total_steps - 1))
    say(
        session.runtime,
        f"the run now has {now.total_steps} steps instead of {old.total_steps}: the learning rate follows its new "
        f"schedule from step {progress.step + 1} on, {rate:.2e} -> {now.learning_rate(progress.step):.2e}",
    )


def _forget_what_is_gone(session: Session, progress: Progress, *, same_evaluation: bool) -> None:
    """Forget the best evaluation loss unless the model that had it is there, and was judged on the same pairs.

    All processes take part: the main one looks.
    """
    if math.isinf(progress.best_loss):
        return
    output, runtime = session.job.output, session.runtime
    there = runtime.any(runtime.is_main and bring_back_best(output, progress))
    by = session.config.output.best_by
    if there and same_evaluation and progress.best_by == by:
        return
    why = "its model is not there" if same_evaluation else "the evaluation pairs are others"
    if there and same_evaluation:
        why = f"now {by} says what is best"
    value = f"{progress.best_by} {abs(progress.best_loss):.4f}"
    if keeps_best(session.config):
        say(runtime, f"the best evaluation so far ({value}) is forgotten: {why}")
    progress.best_loss, progress.best_step, progress.evaluations_since_best = math.inf, 0, 0
    if runtime.is_main:
        shutil.rmtree(output / "best", ignore_errors=True)


def rewind(metrics: Path, step: int, *, owes_evaluation: bool = False) -> None:
    """Drop the lines of what was done after the checkpoint: it is done, and written, again.

    Args:
        metrics: The run's `metrics.jsonl`; it is replaced as a whole, and may be missing.
        step: Steps done at the checkpoint; their lines are kept.
        owes_evaluation: Whether the evaluation of the last of them comes after the checkpoint.
    """
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            done, again = row["step"], owes_evaluation and row["split"] == "eval"
        except (ValueError, KeyError):  # the line that was being written when the run was ended
            continue
        if done < step or (done == step and not again):
            kept.append(line + "\n")
    staging = metrics.with_name(f".{metrics.name}.tmp")
    staging.write_text("".join(kept), encoding="utf-8")
    staging.replace(metrics)


def _prune(directory: Path, keep: int) -> None:
    for old in complete(directory)[:-keep]:
        (old / COMPLETE).unlink()  # first, lest half a checkpoint counts if this is interrupted
        shutil.rmtree(old, ignore_errors=True)
