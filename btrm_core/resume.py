"""Resumable checkpoints: weights, optimiser and position of a run, each complete or not there at all.

Decides: where they lie (`resume/step-N` in the output directory), when one counts, and when a run may go on from one.
The order of the data needs no state: it follows from the seed and the step.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from btrm_core.checkpoint import explained, publish
from btrm_core.config import flat
from btrm_core.distributed import Runtime
from btrm_core.errors import CheckpointError
from btrm_core.settings import RunConfig
from btrm_core.trainer import Progress

COMPLETE = "COMPLETE"
STATE = "state"
FREE_TO_CHANGE = (
    "output.",
    "data.workers",
    "data.cache_dir",
    "data.strict",
    "train.tokens_per_batch",
    "train.auto_budget",
    "train.max_hours",
    "train.skip_nan",
    "train.early_stopping",
    "model.attention",
    "model.kernels",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "train.layout",
)
"""Settings that change no result: a resumed run may have others."""


def identity(config: RunConfig, data_fingerprint: str, world: int) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    kept = {k: v for k, v in flat(config).items() if not k.startswith(FREE_TO_CHANGE)}
    return json.loads(json.dumps({**kept, "data": data_fingerprint, "processes": world}))  # type: ignore[no-any-return]


def save(
    engine: Any,
    progress: Progress,
    runtime: Runtime,
    directory: Path,
    who: dict[str, Any],
    keep: int,
    write_model: Callable[[Path], None],
) -> Path:
    """Write the checkpoint of a step; all processes take part, and it counts only when all have finished.

    It holds DeepSpeed's state and, in `model/`, the model as transformers reads it (`write_model` writes that).

    Raises:
        CheckpointError: the disk is full or cannot be written; the checkpoint before is still there.
    """
    target = directory / f"step-{progress.step:08d}"
    staging = directory / f".{target.name}.tmp"
    try:
        if runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        runtime.barrier()
        engine.save_checkpoint(str(staging), tag=STATE, save_latest=False)
        write_model(staging / "model")
        runtime.barrier()
        if runtime.is_main:
            state = {"progress": dataclasses.asdict(progress), "identity": who}
            (staging / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            (staging / COMPLETE).touch()
            publish(staging, target)
            _prune(directory, keep)
    except Exception as error:
        if runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise explained(error, target) from error
    runtime.barrier()
    return target


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first."""
    return sorted(path.parent for path in directory.glob(f"step-*/{COMPLETE}"))


def find(resume: str, directory: Path) -> Path | None:
    """The checkpoint a `--resume` value means; None means to begin anew.

    Raises:
        CheckpointError: a checkpoint was asked for and there is no complete one.
    """
    if resume == "no":
        return None
    if resume in ("auto", "latest-good"):
        found = complete(directory)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / COMPLETE).exists():
        raise CheckpointError(f"--resume {resume}: there is no complete checkpoint (no file {COMPLETE} in it)")
    return path


def load(engine: Any, path: Path, who: dict[str, Any], force: bool) -> Progress:
    """Put weights and optimiser back as they were, and return where the run stood.

    Raises:
        CheckpointError: data or settings differ (each difference is named) and `force` is off, or files are damaged.
    """
    try:
        state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error
    before, now = state["identity"], json.loads(json.dumps(who))
    changed = [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed and not force:
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(changed)}; use the settings and data of before, or --force-resume"
        )
    try:
        engine.load_checkpoint(str(path), tag=STATE)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"the checkpoint {path} cannot be loaded: {first}") from error
    return Progress(**{**state["progress"], "stopped": None})


def _prune(directory: Path, keep: int) -> None:
    for old in complete(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
