"""Turning a run under way into a model directory: gather the weights, merge adapters, describe, write.

All processes take part; the main one writes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from btrm_core.console import LongWork, say
from btrm_core.errors import CheckpointError
from btrm_core.evaluation import badness
from btrm_core.files import publish, until_there_is_room, whole_directory
from btrm_core.model import (
    Trained,
    as_merged,
    base_licence,
    is_finished,
    mark_finished,
    merged_weights,
    model_card,
    plain_model,
    read_manifest,
    run_manifest,
    uses_softcap,
    write_model,
)
from btrm_core.packing import alone, collate
from btrm_core.training.schedule import Progress

if TYPE_CHECKING:
    from btrm_core.training.session import Session

SELF_TEST_PAIRS = 2


def save_run(
    session: Session,
    progress: Progress,
    evaluation: dict[str, Any] | None,
    directory: Path,
    give_up: Callable[[], bool] | None = None,
) -> None:
    """Write the live model to `directory`, atomically; with adapters, merged unless the run keeps them apart.

    All processes call it.

    Args:
        session: The run.
        progress: Where it stands.
        evaluation: The figures of this very model.
        directory: Where it goes.
        give_up: Where this is the last save: waits for room on a full disk until this is true; None does not wait.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    with LongWork(f"saving the model in {directory}"):
        _save(session, progress, evaluation, directory, give_up)


def _save(
    session: Session,
    progress: Progress,
    evaluation: dict[str, Any] | None,
    directory: Path,
    give_up: Callable[[], bool] | None,
) -> None:
    runtime, config, model = session.runtime, session.config, session.engine.module
    vectors, saved_as = _self_test(session)
    gathered = runtime.accelerator.get_state_dict(session.engine)
    if runtime.is_main:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        plain = model.hf.get_base_model() if hasattr(model.hf, "get_base_model") else model.hf
        trained = Trained(
            data=session.data.report,
            evaluation=evaluation,
            training={
                "steps": progress.step,
                "finished": progress.is_done(session.schedule.total_steps),
                "seconds": round(progress.seconds, 1),
                "skipped_steps": progress.skipped_steps,
                "layout": session.form.layout,
                "kernel": session.form.kernel,
            },
            self_test=vectors,
            dtype=str(runtime.dtype).removeprefix("torch."),
            base_commit=getattr(model.base_model.config, "_commit_hash", None),
            adapters=saved_as,
            architecture=type(plain).__name__,
            causal=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(plain.config.model_type),
            softcap=uses_softcap(plain.config),
            licence=base_licence(config.model.name or "", config.model.revision),
        )
        made = run_manifest(config, session.job.family, session.job.chat, trained)
        weights = {name.removeprefix("hf."): tensor for name, tensor in gathered.items()}
        hf = model.hf
        if saved_as is not None and saved_as["merged"]:
            hf, weights = plain_model(model.hf), merged_weights(model.hf, weights)
        card = model_card(made, config.output.push_to or directory.name)
        write = partial(write_model, directory, hf, weights, session.job.chat, made, card)
        seconds = config.output.wait_for_room if give_up is not None else 0.0
        for told in until_there_is_room(write, seconds, give_up or bool):
            say(runtime, told)
    runtime.barrier()


def _self_test(session: Session) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The self-test vectors of what is saved, and, with adapters, how they are saved and what merging changes."""
    live = self_test_vectors(session)
    if session.config.lora.rank is None:
        return live, None
    if not session.config.lora.merge:
        return live, {"merged": False}
    with as_merged(session.engine.module.hf):
        merged = self_test_vectors(session)
    changes = [abs(before["reward"] - after["reward"]) for before, after in zip(live, merged, strict=True)]
    return merged, {"merged": True, "conversations": len(changes), "largest_reward_change": max(changes, default=0.0)}


@torch.no_grad()
def self_test_vectors(session: Session) -> list[dict[str, Any]]:
    """A few conversations as ids with the model's reward, each computed alone: what any reader must reproduce.

    Args:
        session: The run; all processes take part, and its engine is in training mode afterwards.

    Returns:
        Both sides of the first `SELF_TEST_PAIRS` held-out (else training) pairs: keys `input_ids` and `reward`.
    """
    pairs, engine, form = session.data.eval or session.data.train, session.engine, session.form
    engine.eval()
    vectors = []
    for i in range(min(SELF_TEST_PAIRS, len(pairs))):
        for ids in pairs.pair(i).sequences:
            batch = collate([alone(ids)], kernel=form.kernel, multiple_of=form.multiple_of, pad_id=form.pad_id)
            reward = float(engine(batch.to(session.runtime.device)).item())
            vectors.append({"input_ids": ids.tolist(), "reward": reward})
    engine.train()
    return vectors


def publish_best(best: Path, directory: Path, *, done: bool) -> dict[str, Any]:
    """Let the best model of a run be its final one; the main process calls it.

    Args:
        best: Its directory; it stays for a run that may go on, if there is room for both.
        directory: Where it goes.
        done: Whether the run is done.

    Returns:
        The evaluation of that model.
    """
    if done:
        mark_finished(best)
        publish(best, directory)
    else:
        try:
            with whole_directory(directory) as staging:
                shutil.copytree(best, staging, dirs_exist_ok=True)
        except OSError:
            publish(best, directory)
    evaluation: dict[str, Any] = read_manifest(directory)["evaluation"]
    return evaluation


def bring_back_best(output: Path, progress: Progress) -> bool:
    """Whether the best model that a run remembers is there; that of a finished run is taken from its final place.

    Args:
        output: The run's output directory.
        progress: What it remembers.
    """
    for place in (output / "best", output / "model"):
        if not is_finished(place):
            continue
        made = read_manifest(place)
        if made.get("training", {}).get("steps") != progress.best_step or made.get("evaluation") is None:
            continue
        if place.name == "best":
            return True
        if math.isclose(badness(made["evaluation"], progress.best_by), progress.best_loss, rel_tol=1e-9):
            with whole_directory(output / "best") as staging:
                shutil.copytree(place, staging, dirs_exist_ok=True)
            return True
    return False


OPTIMIZER_BYTES = 12
"""Of a trained parameter: master weight and two moments in fp32."""


def room_needed(session: Session) -> tuple[int, int]:
    """Bytes on disk of the finished model, and of the checkpoints that are kept while one more is written.

    Args:
        session: The run.
    """
    model = session.engine.module
    counts = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    width = session.runtime.dtype.itemsize
    whole = sum(count for count, _ in counts) * width
    trained = sum(count for count, needed in counts if needed)
    checkpoint = whole + trained * OPTIMIZER_BYTES + trained * width
    output, steps = session.config.output, session.schedule.total_steps
    written = (steps - 1) // output.save_every if output.save_every else 0  # none after the last step
    return whole, checkpoint * max(1, min(output.keep_last + 1, written))  # one where the run is asked to stop


def check_room(session: Session, free: int) -> None:
    """Refuse to begin a run whose model will find no room, and say so where its checkpoints will find none.

    Args:
        session: The run.
        free: Free bytes of the output directory's disk.

    Raises:
        CheckpointError: the disk has less room than the finished model takes, or, with `--save-every`, than the
            checkpoints take.
    """
    model, checkpoints = room_needed(session)
    needed = model + (checkpoints if session.config.output.save_every else 0)
    output = session.job.output
    if free < needed:
        raise CheckpointError(
            f"{output} has {free / 1e9:.2f} GB free, but the run needs {needed / 1e9:.2f} GB for its model"
            f"{' and checkpoints (--keep-last)' if session.config.output.save_every else ''}; free some space, or "
            "choose another --output"
        )
    if free < model + checkpoints:
        say(
            session.runtime,
            f"{output} has {free / 1e9:.2f} GB free: not enough for a checkpoint ({checkpoints / 1e9:.2f} GB), should "
            "this run be asked to stop",
        )
