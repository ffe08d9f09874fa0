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
from btrm_core.training.processes.zero_file import accepted, read_file, understood

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


SETTING_OF = {
    "gradient_clipping": "train.max_grad_norm",
    "optimizer.params.lr": "train.learning_rate",
    "optimizer.params.betas": "train.adam_beta1 and train.adam_beta2",
    "optimizer.params.eps": "train.adam_eps",
    "optimizer.params.weight_decay": "train.weight_decay",
    "train_batch_size": "train.pairs_per_step",
    "train_micro_batch_size_per_gpu": "train.tokens_per_batch",
    "gradient_accumulation_steps": "train.pairs_per_step and train.tokens_per_batch",
    "optimizer.type": "train.optimizer",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype, which is bf16 or fp32",
}
"""Which of btrm's settings say what a key of DeepSpeed says."""


NEEDED_OF_ZERO = {
    "stage3_gather_16bit_weights_on_model_save": True,
    "load_from_fp32_weights": True,
    "compute_grad_norm": True,
}
"""What a file may say otherwise to no end: the finished model is gathered, a checkpoint is loaded as it was, and the
norm of the gradient is reported."""
DEFAULTS_OF_ADAM = {"adam_w_mode": True, "bias_correction": True}
"""What AdamW is, which DeepSpeed's own versions can be told not to be."""


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: a preset, or the user's file with its "auto" keys filled.

    Args:
        config: The run's settings.
        world: Number of processes.

    Raises:
        ConfigError: the preset is unknown, the file is not JSON, DeepSpeed does not take it, it asks for stage 0 or
            sets a key that btrm derives to another value (both values are named); or 4-bit weights or 8-bit states do
            not go with it.
    """
    name = config.distributed.deepspeed
    if name in PRESETS:
        user: dict[str, Any] = {"zero_optimization": dict(PRESETS[name])}
    elif Path(name).suffix or Path(name).expanduser().exists():
        user = understood(read_file(name), name)
    else:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(f"--deepspeed {name!r}: expected one of {', '.join(PRESETS)} or a DeepSpeed JSON file.{hint}")
    asked = user.get("bf16", {}).get("enabled") if config.model.dtype == "auto" else None
    bf16 = compute_dtype(config.model.dtype) == torch.bfloat16 if asked is None else asked
    merged = _merge(user, _derived(config, bf16), name)
    _send_sums_whole(merged, world)
    # it waits for the GPU before every micro-batch (deepspeed/utils/timer.py, ThroughputTimer.start); btrm measures too
    merged.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if world == 1:
        # nothing is sent, so gradients need not be copied into a bucket; those larger than it are taken as they are
        merged["zero_optimization"].setdefault("reduce_bucket_size", LONE_BUCKET)
    check_zero(config, merged["zero_optimization"])
    if config.train.optimizer in OPTIMIZERS:
        del merged["optimizer"]  # it is made here and handed over whole, see `engine.make_engine`
        merged["zero_allow_untested_optimizer"] = True
    if name not in PRESETS:
        accepted(merged, name)
        copies = merged["zero_optimization"].get("zero_hpz_partition_size", 1)
        if world % max(copies, 1):
            raise ConfigError(
                f"{name}: zero_optimization.zero_hpz_partition_size = {copies} with {world} process(es): expected a "
                "number that divides them, such as the GPUs of one machine"
            )
    return merged


def _send_sums_whole(merged: dict[str, Any], world: int) -> None:
    """Keep gradients in fp32 where DeepSpeed would round what has been added up in fp32 to the model's bf16.

    It does so for what it sends, even where there is nobody to send it to. At stage 1 the sum of all micro-batches is
    sent, once a step. At stages 2 and 3 several processes send every micro-batch's gradient, which is bf16 from the
    start and is then added up in fp32: sending that in fp32 would double the traffic of each micro-batch.
    """
    if merged["bf16"]["enabled"] and (world == 1 or merged["zero_optimization"]["stage"] == 1):
        merged.setdefault("communication_data_type", "fp32")


def _derived(config: RunConfig, bf16: bool) -> dict[str, Any]:
    """The keys that follow from btrm's settings; a user's file may leave them out or say "auto"."""
    train = config.train
    adam = {
        **DEFAULTS_OF_ADAM,
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
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if train.pairs_per_step is not None:
        derived["train_batch_size"] = train.pairs_per_step
    return derived


def _merge(user: dict[str, Any], derived: dict[str, Any], source: str) -> dict[str, Any]:
    """Put the derived keys into the user's configuration, refusing contradictions."""
    merged = json.loads(json.dumps(user))
    merged.pop("scheduler", None)  # the learning rate is a function of the step and set by the trainer
    stage = merged.setdefault("zero_optimization", {}).get("stage", 1)
    if stage == 0:
        raise ConfigError(
            f"{source}: zero_optimization.stage = 0, expected 1, 2 or 3: without ZeRO, DeepSpeed's bf16 optimiser "
            "makes a wrong first update and reports no gradient norm in fp32; use --deepspeed zero1"
        )
    merged["zero_optimization"].setdefault("stage", 1)
    merged["zero_optimization"].update(NEEDED_OF_ZERO)
    _fill(merged, derived, source, "")
    merged.pop("train_batch_size", None)  # DeepSpeed counts micro-batches by it, which are btrm's own
    if not merged["bf16"]["enabled"]:
        del merged["data_types"]  # everything is fp32
    else:
        # each gradient goes to its fp32 sum at once; otherwise all bf16 gradients lie there a second time until then
        merged["bf16"].setdefault("immediate_grad_update", True)
    params = {key: merged["optimizer"]["params"][key] for key in ("lr", "betas", "eps", "weight_decay")}
    # torch's own AdamW: DeepSpeed's fused ones are C++ that is compiled at run time
    merged["optimizer"] = {"type": "AdamW", "params": {**params, "torch_adam": True, "fused": True}}
    return dict(merged)


def _fill(target: dict[str, Any], derived: dict[str, Any], source: str, path: str) -> None:
    for key, value in derived.items():
        where = f"{path}{key}"
        given = target.get(key)
        if isinstance(value, dict) and isinstance(given, dict):
            _fill(given, value, source, f"{where}.")
        elif given is None or (given == value and isinstance(given, bool) == isinstance(value, bool)):
            target[key] = json.loads(json.dumps(value))
        elif where == "optimizer.type" and str(given).lower() in ("adam", "adamw"):
            target[key] = "AdamW"
        else:
            raise ConfigError(
                f'{source}: {where} = {given!r} contradicts btrm\'s {value!r}; leave it out or set it to "auto" '
                f"(btrm derives it from {SETTING_OF.get(where, 'its own settings')})"
            )


def compute_dtype(name: str) -> torch.dtype:
    """The compute type a setting names: auto is bf16 on a GPU and fp32 on a CPU.

    Args:
        name: "auto", "bf16" or "fp32", as in `model.dtype`.
    """
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
