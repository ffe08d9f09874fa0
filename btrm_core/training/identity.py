"""What must be the same for a run to go on from a checkpoint: contents and settings, never paths.

Decides: which settings change a result, and by which digests data, tokenizer, template and weights are known. What was
saved by an earlier version is compared as far as it was recorded; a setting that it did not know had its default.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from btrm_core.chat import tokenizer_fingerprint
from btrm_core.config import apply, flat
from btrm_core.console import LongWork
from btrm_core.errors import CheckpointError
from btrm_core.files import text_sha256
from btrm_core.settings import OutputConfig, RunConfig, declared
from btrm_core.training.processes import gather
from btrm_core.training.session import Data, Job, Session
from btrm_core.weights import weights_digest

FREE_TO_CHANGE = (
    "family",
    "force_family",
    "output.",
    "model.name",
    "model.revision",
    "model.trust_remote_code",
    "data.train",
    "data.eval",
    "data.map",
    "data.format",
    "data.held_out_fraction",
    "data.workers",
    "data.cache_dir",
    "data.strict",
    "train.epochs",
    "train.max_steps",
    "train.tokens_per_batch",
    "train.auto_budget",
    "train.max_hours",
    "train.max_total_hours",
    "train.skip_nan",
    "train.early_stopping",
    "model.attention",
    "model.dtype",
    "model.kernels",
    "model.gradient_checkpointing",
    "model.selective_checkpointing",
    "model.activation_offload",
    "distributed.",
    "tokenizer.chat_template",
    "train.layout",
)
"""Settings that change no result, or are known by what they lead to: a resumed run may have others. What data, weights
and chat format are is compared by content; what is computed in, the ZeRO stage and the number of processes as they turn
out; the length of a run is said and changes its learning rates from there on."""
WITH_DROPOUT = ("train.tokens_per_batch", "train.layout", "distributed.sequence_parallel")
"""Settings that change what dropout draws: which sequences lie together in a row, and who computes them."""
FAMILY = "family's name"
"""Its own, however it was found."""
PROCESSES, STAGE, OPTIMIZER = "processes", "ZeRO stage", "train.optimizer"
"""What the optimiser's state is cut by, and whose it is: it is cut anew for other processes, but for no other stage."""
VERSION = "btrm"
EVALUATION = "evaluation pairs"
OLD_NAMES = ("data", "model.name", "model.revision", "data.train", "data.eval", "train.epochs", "train.max_steps")
"""Recorded by a version that knew no digests of contents: its paths say nothing, its fingerprint of the rows does."""


def fingerprints(job: Job, data: Data) -> dict[str, str]:
    """What a run is trained on, as short digests by name, for all processes to compare.

    Args:
        job: Its settings and chat format.
        data: Its pairs.
    """
    whole = {
        "data": str(data.report["fingerprint"]),
        "chat template": job.chat.template_sha256,
        "training pairs": data.train.digest,
        EVALUATION: data.eval.digest if data.eval is not None else "none",
    }
    return {name: value[:12] for name, value in whole.items()}


def identity(session: Session) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint, as JSON values by name.

    Args:
        session: The run.
    """
    config, data, runtime, chat = session.config, session.data, session.runtime, session.job.chat
    commit = getattr(session.engine.module.base_model.config, "_commit_hash", None)
    with LongWork(f"reading the weights of {config.model.name}"):
        weights = weights_digest(str(config.model.name), commit) if runtime.is_main else ""  # read once
    made = {
        **_compared(config),
        FAMILY: session.job.family.name,
        "data": data.report["fingerprint"],
        "training pairs": data.train.digest,
        EVALUATION: text_sha256(data.eval.digest + str(data.eval.subsets())) if data.eval is not None else "none",
        "tokenizer": tokenizer_fingerprint(chat.tokenizer),
        "chat template": chat.template_sha256,
        "base weights": gather(runtime, weights)[0],
        "dtype": str(runtime.dtype).removeprefix("torch."),
        PROCESSES: runtime.world,
        STAGE: runtime.zero_stage,
        VERSION: version("btrm"),
    }
    return json.loads(json.dumps(made))  # type: ignore[no-any-return]


def _compared(config: RunConfig) -> dict[str, Any]:
    """The settings that must be the same, by key."""
    also = WITH_DROPOUT if config.lora.dropout or config.model.dropout else ()
    values = {key: value for key, value in flat(config).items() if key in also or not key.startswith(FREE_TO_CHANGE)}
    return {**values, "lora.targets": sorted(config.lora.targets)}  # their order says nothing


def settings_changed(made: dict[str, Any], config: RunConfig) -> list[str]:
    """What differs between the settings of a finished model and those of a run, a line each.

    Args:
        made: Its settings by key, as in `btrm.json`; a setting it lacks had its default.
        config: Resolved settings of the run.
    """
    before, now = apply(RunConfig(), {key: value for key, value in made.items() if key in declared()}), config
    changed = differences({**_compared(before), VERSION: ""}, json.loads(json.dumps(_compared(now))))
    return list(changed.values())


def refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any], output: OutputConfig) -> None:
    """Raise unless a run may go on from a checkpoint.

    Args:
        path: The checkpoint.
        before: The identity it was saved with.
        now: That of this run.
        output: What is forced: `--force-resume` allows other data and settings, `--restart-optimizer` another ZeRO
            stage, number of processes or kind of optimiser.

    Raises:
        CheckpointError: something differs and is not forced; each difference is named.
    """
    changed = differences(before, now)
    processes = changed.pop(PROCESSES, None)
    if processes and (now.get("lora.dropout") or now.get("model.dropout")):
        changed[PROCESSES] = f"{processes} (which dropout draws by)"
    cut = [changed.pop(k) for k in (STAGE, OPTIMIZER) if k in changed]
    if processes and now.get(OPTIMIZER) != "adamw":  # moments of 8 bits share their scales across any new cut
        cut.append(processes)
    if cut and not output.restart_optimizer:
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(cut)}; the optimiser's state cannot be taken over. Use those of "
            "before, or go on with the weights and a fresh optimiser by --restart-optimizer"
        )
    if changed and not output.force_resume:
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(changed.values())}; use the settings and data of before, or "
            "--force-resume"
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two identities, as a line by name.

    Args:
        before: That of a checkpoint; a setting it lacks is one its version did not know, and had its default.
        now: That of this run.
    """
    defaults = json.loads(json.dumps(flat(RunConfig())))
    old = VERSION not in before
    skipped = {VERSION, *(OLD_NAMES[1:] if old else ("data",))}
    if old:  # contents were not recorded; the fingerprint of the rows was
        skipped |= {"training pairs", EVALUATION, "tokenizer", "base weights"}
    if FAMILY not in before:
        skipped.add(FAMILY)
    lines = {}
    for name in {**before, **now}:
        had = before.get(name, defaults.get(name))
        if name in skipped or (name not in now and name.startswith(FREE_TO_CHANGE)) or had == now.get(name):
            continue
        lines[name] = f"{name}: {_short(had)} -> {_short(now.get(name))}"
    return lines


def _short(value: Any) -> str:
    """A value as it is told: of a digest, its beginning."""
    digest = isinstance(value, str) and len(value) >= 32 and all(c in "0123456789abcdef" for c in value)
    return f"{value[:12]}…" if digest else repr(value)
