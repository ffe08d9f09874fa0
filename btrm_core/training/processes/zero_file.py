"""A user's DeepSpeed file: read as DeepSpeed reads it, and brought to what DeepSpeed and btrm both understand.

Decides: which keys there are, what "auto" and null say (nothing: the key is left out), which sections do not go with
btrm. What is left is tried on DeepSpeed's own parser, so that no mistake waits for the first step, or for the last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btrm_core.errors import ConfigError, did_you_mean, first_line

SWITCHES = frozenset(
    """
    disable_allgather disable_python_gc dump_state fp32_allreduce memory_breakdown prescale_gradients
    use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    """.split()
)
NUMBERS = frozenset(
    """
    gradient_accumulation_steps gradient_clipping gradient_predivide_factor seed steps_per_print train_batch_size
    train_micro_batch_size_per_gpu vocabulary_size
    """.split()
)
WORDS = frozenset(("communication_data_type", "log_level", "seq_parallel_communication_data_type"))
SECTIONS: dict[str, frozenset[str] | None] = {
    "activation_checkpointing": frozenset(
        """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary
        """.split()
    ),
    "aio": frozenset(
        "block_size intra_op_parallelism overlap_events queue_depth single_submit thread_count use_gds".split()
    ),
    "bf16": None,
    "bfloat16": None,
    "checkpoint": frozenset(("load_universal", "parallel_write", "tag_validation", "use_node_local_storage", "writer")),
    "comet": None,
    "comms_logger": None,
    "csv_monitor": None,
    "data_types": frozenset(("grad_accum_dtype",)),
    "flops_profiler": frozenset(
        "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules".split()
    ),
    "fp16": None,
    "optimizer": frozenset(("legacy_fusion", "params", "type")),
    "optimizer.params": frozenset(
        "adam_w_mode amsgrad betas bias_correction eps foreach fused lr torch_adam weight_decay".split()
    ),
    "scheduler": frozenset(("params", "type")),
    "tensorboard": None,
    "timers": frozenset(("throughput",)),
    "timers.throughput": None,
    "wandb": None,
    "zero_optimization": None,
    "zero_optimization.offload_optimizer": None,
    "zero_optimization.offload_param": None,
}
"""Objects, and their keys where DeepSpeed itself ignores others without a word (None: it refuses them)."""
NOT_WITH_BTRM = {
    "amp": "btrm computes in bf16 or fp32",
    "autotuning": "`btrm plan` says what fits",
    "bf16.bf16_master_weights_and_grads": "master weights are fp32",
    "bf16.bf16_optimizer_states": "the optimizer's states are fp32, or 8 bits with --optimizer adamw-8bit",
    "checkpoint.load_universal": "--resume converts a checkpoint of another number of processes itself",
    "checkpoint.use_node_local_storage": "--resume needs one output directory that all machines share",
    "checkpoint.writer": "btrm has each part of a checkpoint written and flushed before it counts",
    "compile": "btrm's rows have a new length every step, which would compile anew each time",
    "compression_training": "weights are trained as they are",
    "curriculum_learning": "btrm plans which pairs make up a step",
    "data_efficiency": "btrm plans which pairs make up a step",
    "datastates": "btrm has each part of a checkpoint written and flushed before it counts",
    "eigenvalue": "weights are trained as they are",
    "elasticity": "btrm derives the batch from --pairs-per-step, for any number of processes",
    "expert_parallel": "btrm splits optimizer states and weights by ZeRO alone",
    "gradient_allreduce_op": "btrm weighs the gradients of processes itself; only 'mean' is right",
    "graph_harvesting": "DeepSpeed has removed it",
    "hybrid_engine": "a reward model generates nothing",
    "managed_gradient_accumulation": "btrm sets the borders of steps itself",
    "nebula": "btrm writes checkpoints to --output",
    "optimizer.params.amsgrad": "the optimizer is AdamW without it",
    "pipeline": "a reward model is not cut into pipeline stages here",
    "progressive_layer_drop": "every reward is that of the whole model",
    "quantize_training": "weights are trained as they are",
    "sequence_parallel_size": "--sequence-parallel N says it",
    "sparse_attention": "attention is the model's own",
    "sparse_gradients": "DeepSpeed has removed it",
    "tensor_parallel": "btrm splits optimizer states and weights by ZeRO alone",
    "torch_autocast": "btrm computes in bf16 or fp32",
    "weight_quantization": "weights are trained as they are",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is another engine",
    "zero_optimization.mics_shard_size": "MiCS is another engine",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer is another one",
    "zero_optimization.zenflow": "it updates weights by old gradients",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded to a few bits on the way",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights would be rounded to a few bits",
    "zero_optimization.zero_quantized_weights": "weights would be rounded to a few bits on the way",
    "zero_optimization.zeropp_loco_param": "gradients would be rounded to a few bits on the way",
}
"""What is refused when it is switched on, and why; switched off, it is left out."""
OFF: tuple[Any, ...] = (None, False, 0, 1, -1, "", "none", "mean")
"""What numbers and words say of such a key when it does nothing: one part, no part, the mean that it is anyway."""
PARSERS: dict[str, tuple[str, ...]] = {
    "commslogger": ("comms_logger",),
    "monitor": (),
    "throughputtimer": ("timers", "throughput"),
    "zero": ("zero_optimization",),
}
"""Sections whose parsers DeepSpeed calls otherwise; the monitor's name them themselves."""
OLD_NAMES = {
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "cpu_offload_params": "cpu_offload_param",
}
"""Keys of `zero_optimization` by which other files say the same."""


def read_file(path: str) -> dict[str, Any]:
    """The content of a DeepSpeed configuration file: JSON, or what DeepSpeed takes for it (comments, trailing commas).

    Args:
        path: The file.

    Raises:
        ConfigError: it cannot be read, is something else, or has a key twice.
    """
    import hjson

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text; save it as UTF-8"
        raise ConfigError(f"cannot read the DeepSpeed configuration {path}: {reason}") from error
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        try:
            value = hjson.loads(text, object_pairs_hook=_no_key_twice) if text.lstrip()[:1] in tuple("{/#") else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ConfigError(
                f"the DeepSpeed configuration {path} is not valid JSON: {first_line(error)}; expected an object such "
                'as {"zero_optimization": {"stage": 2}}'
            ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"the DeepSpeed configuration {path} holds a {type(value).__name__}, expected an object")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def understood(user: dict[str, Any], source: str) -> dict[str, Any]:
    """A file's content under today's names, without what says nothing, after looking for what would not be done.

    Args:
        user: The content.
        source: The file, for messages.

    Raises:
        ConfigError: a key is unknown or has a value of another kind, or something is asked for that btrm does not do.
    """
    user = _said(user)
    user = _renamed(user, {"bfloat16": "bf16"}, source, "")
    zero = user.setdefault("zero_optimization", {})
    if isinstance(zero, dict):
        user["zero_optimization"] = _renamed(zero, OLD_NAMES, source, "zero_optimization.")
    _refuse_what_btrm_does_not(user, source)
    known = {*SWITCHES, *NUMBERS, *WORDS, *(name for name in SECTIONS if "." not in name)}
    _refuse_unknown(user, known, source, "")
    for key, value in user.items():
        if key in SWITCHES and not isinstance(value, bool):
            raise ConfigError(f"{source}: {key} = {value!r}, expected true or false")
        if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f'{source}: {key} = {value!r}, expected a number or "auto"')
    for path, keys in SECTIONS.items():
        section = _at(user, path)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{source}: '{path}' is {section!r}, expected an object")
        if section is not None and keys is not None:
            _refuse_unknown(section, keys, source, f"{path}.")
    for path in ("bf16", "fp16"):
        enabled = _at(user, f"{path}.enabled")
        if not isinstance(enabled, bool | None):
            raise ConfigError(f'{source}: {path}.enabled = {enabled!r}, expected true, false or "auto"')
    _check_zero(user["zero_optimization"], source)
    return user


def accepted(merged: dict[str, Any], source: str) -> None:
    """Let DeepSpeed's own parser read a whole configuration, before anything is loaded for it.

    Args:
        merged: The configuration; it is not changed.
        source: The user's file, for the message.

    Raises:
        ConfigError: DeepSpeed does not take it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(json.loads(json.dumps(merged)))
    except ValidationError as error:
        found = error.errors()[0]
        short = error.title.removeprefix("DeepSpeed").removesuffix("Config").lower()
        where = ".".join((*PARSERS.get(short, (short,)), *(str(part) for part in found["loc"])))
        if found["type"] == "extra_forbidden":
            known = {name for model in DeepSpeedConfigModel.__subclasses__() for name in model.model_fields}
            hint = did_you_mean(str(found["loc"][-1]), known)
            raise ConfigError(f"{source}: DeepSpeed knows no '{where}'.{hint}") from error
        given = "" if isinstance(found["input"], dict) else f" = {found['input']!r}"
        raise ConfigError(f"{source}: DeepSpeed does not take {where}{given}: {found['msg']}") from error
    except Exception as error:
        raise ConfigError(f"{source}: DeepSpeed does not take this configuration: {first_line(error)}") from error


def remarks(path: str) -> list[str]:
    """What a DeepSpeed file says that has no effect here, as lines for the user.

    Args:
        path: The file, which `understood` has taken.
    """
    user, lines = _said(read_file(path)), []
    if user.get("scheduler", {}).get("params"):
        lines.append(
            f"{path}: 'scheduler' is not used: train.learning_rate and train.warmup_ratio say the learning rate"
        )
    if _is_on(user.get("activation_checkpointing")):
        lines.append(f"{path}: 'activation_checkpointing' is not used: --gradient-checkpointing does that")
    return lines


def _said(value: Any) -> Any:
    """A value without what says nothing: null is DeepSpeed's own word for its default, "auto" that of transformers.

    Keys such as "_comment" and "//" are how people write remarks into JSON.
    """
    if not isinstance(value, dict):
        return value
    said = {key: inner for key, inner in value.items() if inner is not None and inner != "auto"}
    return {key: _said(inner) for key, inner in said.items() if not key.startswith(("_", "//", "#"))}


def _renamed(given: dict[str, Any], names: dict[str, str], source: str, where: str) -> dict[str, Any]:
    for old, new in names.items():
        if old in given and given.get(new, given[old]) != given[old]:
            raise ConfigError(f"{source}: {where}{old} and {where}{new} mean the same: leave one of them out")
    return {names.get(key, key): value for key, value in given.items()}


def _refuse_what_btrm_does_not(user: dict[str, Any], source: str) -> None:
    for path, why in NOT_WITH_BTRM.items():
        section, _, name = path.rpartition(".")
        place = _at(user, section) if section else user
        if not isinstance(place, dict) or name not in place:
            continue
        if _is_on(place.pop(name)):
            told = path if section else f"'{path}'"
            raise ConfigError(f"{source}: {told} does not go with btrm ({why}); leave it out")


def _is_on(value: Any) -> bool:
    """Whether a section or a key asks for something."""
    if isinstance(value, dict):
        if "enabled" in value or "disable" in value:
            return bool(value.get("enabled", not value.get("disable")))
        return any(_is_on(inner) for inner in value.values())
    return value not in OFF if not isinstance(value, bool) else value


def _refuse_unknown(section: dict[str, Any], known: Any, source: str, where: str) -> None:
    for key in section:
        if key in ("compute_environment", "deepspeed_config", "distributed_type"):
            raise ConfigError(
                f"{source}: '{key}' belongs to a configuration of accelerate; expected DeepSpeed's own, such as "
                '{"zero_optimization": {"stage": 2}}'
            )
        if key not in known:
            raise ConfigError(f"{source}: DeepSpeed knows no '{where}{key}'.{did_you_mean(key, known)}")


def _check_zero(zero: dict[str, Any], source: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    _refuse_unknown(
        zero, {*fields, *(field.alias for field in fields.values() if field.alias)}, source, "zero_optimization."
    )
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{source}: zero_optimization.stage = {stage!r}, expected 1, 2 or 3")


def _at(user: dict[str, Any], path: str) -> Any:
    found: Any = user
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found
