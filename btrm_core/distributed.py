"""Processes, devices and DeepSpeed: everything that differs between one CPU and many GPUs.

Decides: how a run starts its process group, which DeepSpeed configuration it uses, and that nothing is compiled or
printed behind the user's back. Does not decide: what is computed in a step.

DeepSpeed stage 0 is not offered: under bf16 its optimiser counts a dummy step first, so that the first update is a
quarter too small, and under fp32 it reports no gradient norm.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btrm_core import quantized
from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.failure import shared
from btrm_core.joining import TIMEOUT, join
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


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its rank among all, its device, and the compute type."""

    accelerator: Any
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    zero_stage: int

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)


@contextlib.contextmanager
def group(config: RunConfig) -> Iterator[None]:
    """Join the group of all processes of the run; inside, a failure of one ends all of them.

    A process that no launcher started becomes a world of one without opening a port, so that two runs on one machine
    never clash.

    Raises:
        ConfigError: the launcher's variables are wrong, or the processes do not find each other in time.
    """
    join(config.distributed.join_seconds)
    with shared(torch.distributed.get_world_size()):
        yield


@contextlib.contextmanager
def start(config: RunConfig, trackers: list[str] | None = None, project_dir: str | None = None) -> Iterator[Runtime]:
    """Start the process group and Accelerate with DeepSpeed; Accelerate's state is taken down again at the end.

    Raises:
        ConfigError: as `group`; or the DeepSpeed setting is unknown, or its file contradicts what btrm derives; or
            bitsandbytes is asked for and missing.
    """
    quiet()
    with group(config):
        try:
            yield _runtime(config, trackers, project_dir)
        finally:
            from accelerate.state import AcceleratorState, GradientState, PartialState
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
            AcceleratorState._reset_state()
            PartialState._reset_state()
            GradientState._reset_state()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _runtime(config: RunConfig, trackers: list[str] | None, project_dir: str | None) -> Runtime:
    plugin_dict = deepspeed_config(config, torch.distributed.get_world_size())
    quantized.require(config)
    dtype = torch.bfloat16 if plugin_dict["bf16"]["enabled"] else torch.float32
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import DeepSpeedPlugin

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=plugin_dict),
        step_scheduler_with_optimizer=False,
        log_with=trackers or None,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=TIMEOUT)],
    )
    return Runtime(
        accelerator=accelerator,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        device=accelerator.device,
        dtype=dtype,
        zero_stage=int(plugin_dict["zero_optimization"]["stage"]),
    )


def leave() -> None:
    """Leave the process group, at the end of a process; runs within one process share it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def compute_dtype(name: str) -> torch.dtype:
    """The compute type a setting names: auto is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


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
    quantized.check(config, merged["zero_optimization"])
    if config.train.optimizer in quantized.OPTIMIZERS:
        del merged["optimizer"]  # it is made here and handed over whole, see `prepare.make_engine`
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


def quiet() -> None:
    """Before anything imports DeepSpeed: keep it from compiling C++, choosing devices aloud and printing figures."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # without this the first ZeRO engine imports torch's inductor for an optimiser that is not used
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # every step allocates its gradients anew; large pages save most of the page faults (benchmarks/LOG.md)
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    message = r".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated"
    for text in (message, r".*is_gradient_checkpointing. is deprecated"):  # torch's of DeepSpeed, transformers' of peft
        warnings.filterwarnings("ignore", category=FutureWarning, message=text)
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    # prints memory figures to standard output, whatever the level of the log
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    for handler in deepspeed.utils.logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)
    deepspeed.utils.logger.setLevel("ERROR")
    if not torch.cuda.is_available():
        # its only user is inference; otherwise it is compiled at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import transformers

    transformers.logging.disable_progress_bar()
    if os.environ.get("RANK", "0") != "0":
        transformers.logging.set_verbosity_error()
