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


KEYS = frozenset(
    """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger communication_data_type compile
    compression_training csv_monitor curriculum_learning data_efficiency data_types disable_allgather
    dump_state elasticity flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_clipping
    gradient_predivide_factor graph_harvesting memory_breakdown optimizer pipeline prescale_gradients
    progressive_layer_drop scheduler seed seq_parallel_communication_data_type sparse_attention sparse_gradients
    steps_per_print tensorboard tensor_parallel timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
"""Top-level keys of a DeepSpeed configuration (deepspeed.ai/docs/config-json): it ignores others without a word."""
NOT_WITH_BTRM = {
    "amp": "btrm computes in bf16 or fp32",
    "torch_autocast": "btrm computes in bf16 or fp32",
    "compile": "btrm's rows have a new length every step, which would compile anew each time",
    "pipeline": "a reward model is not cut into pipeline stages here",
    "tensor_parallel": "btrm splits optimizer states and weights by ZeRO alone",
    "progressive_layer_drop": "every reward is that of the whole model",
    "curriculum_learning": "btrm plans which pairs make up a step",
    "data_efficiency": "btrm plans which pairs make up a step",
    "compression_training": "weights are trained as they are",
    "elasticity": "btrm derives the batch from --pairs-per-step, for any number of processes",
}
"""Sections that are refused when they are switched on, and why."""
MICS = ("mics_shard_size", "mics_hierarchical_params_gather")
OLD_NAMES = {"stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save"}
"""Keys of `zero_optimization` by which older files say the same."""


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
    elif Path(name).suffix or Path(name).exists():
        user = _understood(_read_json(name), name)
    else:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(f"--deepspeed {name!r}: expected one of {', '.join(PRESETS)} or a DeepSpeed JSON file.{hint}")
    asked = user.get("bf16", {}).get("enabled", "auto") if config.model.dtype == "auto" else "auto"
    bf16 = compute_dtype(config.model.dtype) == torch.bfloat16 if asked == "auto" else bool(asked)
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
    return merged


def _send_sums_whole(merged: dict[str, Any], world: int) -> None:
    """Keep gradients in fp32 where DeepSpeed would round what has been added up in fp32 to the model's bf16.

    It does so for what it sends, even where there is nobody to send it to. At stage 1 the sum of all micro-batches is
    sent, once a step. At stages 2 and 3 several processes send every micro-batch's gradient, which is bf16 from the
    start and is then added up in fp32: sending that in fp32 would double the traffic of each micro-batch.
    """
    if merged["bf16"]["enabled"] and (world == 1 or merged["zero_optimization"]["stage"] == 1):
        merged.setdefault("communication_data_type", "fp32")


def _understood(user: dict[str, Any], source: str) -> dict[str, Any]:
    """A user's file with today's names for its keys, after looking for what DeepSpeed or btrm would not do."""
    for key in user:
        if key not in KEYS:
            raise ConfigError(f"{source}: DeepSpeed knows no '{key}'.{did_you_mean(key, KEYS)}")
    for key, why in NOT_WITH_BTRM.items():
        section = user.get(key)
        off = isinstance(section, dict) and section.get("enabled") is False
        if section and not off:
            raise ConfigError(f"{source}: '{key}' does not go with btrm ({why}); leave it out")
    sections = ("zero_optimization", "bf16", "fp16", "optimizer", "data_types")
    for key in sections:
        if not isinstance(user.get(key, {}), dict):
            raise ConfigError(f"{source}: '{key}' is {user[key]!r}, expected an object")
    if "bfloat16" in user:
        user["bf16"] = user.pop("bfloat16")
    if user.get("data_types", {}).get("grad_accum_dtype", "auto") is None:
        user["data_types"]["grad_accum_dtype"] = "auto"  # DeepSpeed's own word for its default
    user["zero_optimization"] = _zero(user.get("zero_optimization", {}), source)
    return user


def _zero(given: dict[str, Any], source: str) -> dict[str, Any]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = {OLD_NAMES.get(key, key): value for key, value in given.items()}
    fields = DeepSpeedZeroConfig.model_fields
    for key in MICS:
        if zero.pop(key, None) not in (None, -1, False):
            raise ConfigError(f"{source}: zero_optimization.{key} does not go with btrm (MiCS is another engine)")
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in zero:
        if key not in known:
            raise ConfigError(f"{source}: DeepSpeed knows no 'zero_optimization.{key}'.{did_you_mean(key, known)}")
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{source}: zero_optimization.stage = {stage!r}, expected 1, 2 or 3")
    return zero


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
    """The compute type a setting names: auto is bf16 on a GPU and fp32 on a CPU.

    Args:
        name: "auto", "bf16" or "fp32", as in `model.dtype`.
    """
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
