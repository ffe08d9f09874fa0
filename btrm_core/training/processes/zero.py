"""The DeepSpeed configuration of a run: a preset, or the user's own file with what btrm derives filled in.

Decides: which DeepSpeed keys btrm derives, which a user's own file may set, and what is a contradiction.

DeepSpeed stage 0 is not offered: under bf16 its optimiser counts a dummy step first, so that the first update is a
quarter too small, and under fp32 it reports no gradient norm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from btrm_core.config import check_zero
from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.model import OPTIMIZERS
from btrm_core.settings import RunConfig

PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3},
    "zero3-offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


LONE_BUCKET = 100_000
"""Elements of the reduce bucket of a single process: norms and biases together, every matrix alone. DeepSpeed's own
500 million would hold 1 GB (2 GB in fp32) of GPU memory for copies that nobody needs."""


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: a preset, or the user's file with its "auto" keys filled.

    Args:
        config: The run's settings.
        world: Number of processes.

    Raises:
        ConfigError: the preset is unknown, the file is not JSON, asks for stage 0, or sets a key that btrm derives to
            another value (both values are named); or 4-bit weights or 8-bit states do not go with it.
    """
    name = config.distributed.deepspeed
    if name in PRESETS:
        user: dict[str, Any] = {"zero_optimization": dict(PRESETS[name])}
    elif name.endswith(".json"):
        user = _read_json(name)
    else:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(
            f"--deepspeed {name!r}: expected one of {', '.join(PRESETS)} or a DeepSpeed JSON file ending in "
            f".json.{hint}"
        )
    asked = user.get("bf16", {}).get("enabled", "auto") if config.model.dtype == "auto" else "auto"
    bf16 = compute_dtype(config.model.dtype) == torch.bfloat16 if asked == "auto" else bool(asked)
    merged = _merge(user, _derived(config, bf16), name)
    if world == 1:
        # nothing is sent, so gradients need not be copied into a bucket; those larger than it are taken as they are
        merged["zero_optimization"].setdefault("reduce_bucket_size", LONE_BUCKET)
    check_zero(config, merged["zero_optimization"])
    if config.train.optimizer in OPTIMIZERS:
        del merged["optimizer"]  # it is made here and handed over whole, see `engine.make_engine`
        merged["zero_allow_untested_optimizer"] = True
    return merged


def _derived(config: RunConfig, bf16: bool) -> dict[str, Any]:
    """The keys that follow from btrm's settings; a user's file may leave them out or say "auto"."""
    train = config.train
    adam = {
        "lr": train.learning_rate,
        "betas": [train.adam_beta1, train.adam_beta2],
        "eps": train.adam_eps,
        "weight_decay": train.weight_decay,
    }
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True},
    }
    if bf16:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


def _merge(user: dict[str, Any], derived: dict[str, Any], source: str) -> dict[str, Any]:
    """Put the derived keys into the user's configuration, refusing contradictions."""
    merged = json.loads(json.dumps(user))
    merged.pop("train_batch_size", None)
    merged.pop("scheduler", None)  # the learning rate is a function of the step and set by the trainer
    stage = merged.setdefault("zero_optimization", {}).get("stage", 1)
    if stage == 0:
        raise ConfigError(
            f"{source}: zero_optimization.stage = 0, expected 1, 2 or 3: without ZeRO, DeepSpeed's bf16 optimiser "
            "makes a wrong first update and reports no gradient norm in fp32; use --deepspeed zero1"
        )
    merged["zero_optimization"].setdefault("stage", 1)
    _fill(merged, derived, source, "")
    _fill_auto_buckets(merged["zero_optimization"])
    if merged["bf16"]["enabled"]:
        # each gradient goes to its fp32 sum at once; otherwise all bf16 gradients lie there a second time until then
        merged["bf16"].setdefault("immediate_grad_update", True)
    params = merged["optimizer"].setdefault("params", {})
    # torch's own AdamW: DeepSpeed's fused ones are C++ that is compiled at run time
    params.update(torch_adam=True, fused=True)
    return dict(merged)


def _fill(target: dict[str, Any], derived: dict[str, Any], source: str, path: str) -> None:
    for key, value in derived.items():
        where = f"{path}{key}"
        given = target.get(key, "auto")
        if isinstance(value, dict) and isinstance(given, dict):
            _fill(given, value, source, f"{where}.")
        elif given == "auto" or given == value:
            target[key] = json.loads(json.dumps(value))
        elif where.startswith("zero_optimization."):
            continue
        elif where == "optimizer.type" and str(given).lower() in ("adam", "adamw"):
            target[key] = "AdamW"
        else:
            raise ConfigError(
                f'{source}: {where} = {given!r} contradicts btrm\'s {value!r}; leave it out or set it to "auto" '
                "(btrm derives it from its own settings)"
            )


def _fill_auto_buckets(zero: dict[str, Any]) -> None:
    """DeepSpeed itself does not know "auto"; leaving a key out gives its own default."""
    for key in [k for k, v in zero.items() if v == "auto"]:
        del zero[key]


def _read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"the DeepSpeed configuration {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"the DeepSpeed configuration {path} holds a {type(value).__name__}, expected an object")
    return value


def compute_dtype(name: str) -> torch.dtype:
    """The compute type a setting names: auto is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
