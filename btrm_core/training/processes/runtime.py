"""Processes, devices and DeepSpeed: everything that differs between one CPU and many GPUs.

Decides: how a run starts its process group, which DeepSpeed configuration it uses, and that nothing is compiled or
printed behind the user's back. Does not decide: what is computed in a step.

DeepSpeed stage 0 is not offered: under bf16 its optimiser counts a dummy step first, so that the first update is a
quarter too small, and under fp32 it reports no gradient norm.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from btrm_core.console import say
from btrm_core.model import RowShare, require
from btrm_core.settings import RunConfig
from btrm_core.signals import end_with
from btrm_core.training.processes.failure import shared
from btrm_core.training.processes.join import LAUNCHER, TIMEOUT, join
from btrm_core.training.processes.sharing import make_share
from btrm_core.training.processes.zero import PRESETS, deepspeed_config
from btrm_core.training.processes.zero_file import remarks


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its rank among all, its device, the compute type, and whom it shares rows with."""

    accelerator: Any
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    zero_stage: int
    share: RowShare | None = None
    """Its part of every row; None if it computes whole rows."""

    @property
    def ranks(self) -> int:
        """How many rows are computed at once: processes that share rows are one rank of the plan."""
        return self.world // (self.share.count if self.share else 1)

    @property
    def row_rank(self) -> int:
        """Whose rows of the plan this process computes, alone or with others."""
        return self.rank // (self.share.count if self.share else 1)

    @property
    def counts(self) -> bool:
        """True on the one process of those that share rows that adds their figures up."""
        return self.share is None or self.share.index == 0

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place.

        Args:
            tensor: Of equal shape and type everywhere, on this process's device; all processes take part.

        Returns:
            `tensor` itself.
        """
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one.

        Args:
            flag: What holds on this process; all processes take part.
        """
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)


@contextlib.contextmanager
def group(config: RunConfig) -> Iterator[None]:
    """Join the group of all processes of the run; inside, a failure of one ends all of them.

    A process that no launcher started becomes a world of one without opening a port, so that two runs on one machine
    never clash.

    Args:
        config: Of the settings, how many seconds processes wait for each other at the start.

    Raises:
        ConfigError: the launcher's variables are wrong, or the processes do not find each other in time.
    """
    if launcher := os.environ.get(LAUNCHER):
        end_with(int(launcher))
    elif os.environ.get("TORCHELASTIC_RUN_ID"):  # torchrun or accelerate: when its agent is killed, as well
        end_with(os.getppid())
    quiet()
    join(config.distributed.join_seconds)
    with shared(torch.distributed.get_world_size()):
        yield


@contextlib.contextmanager
def start(config: RunConfig, trackers: list[str] | None = None, project_dir: str | None = None) -> Iterator[Runtime]:
    """Start Accelerate with DeepSpeed, inside `group`; Accelerate's state is taken down again at the end.

    Args:
        config: Resolved settings.
        trackers: Names of the trackers to log to.
        project_dir: Where trackers write.

    Raises:
        ConfigError: the DeepSpeed setting is unknown, or its file contradicts what btrm derives; the processes cannot
            share rows as asked; or bitsandbytes is asked for and missing.
    """
    _reset()  # another trainer of this process may have left Accelerate set up for itself
    try:
        runtime = _runtime(config, trackers, project_dir)
        yield runtime
        if runtime.share is not None:  # after a failure the others may not be there to agree
            torch.distributed.destroy_process_group(runtime.share.processes)
    finally:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        _reset()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _reset() -> None:
    """Take down what Accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()


def _runtime(config: RunConfig, trackers: list[str] | None, project_dir: str | None) -> Runtime:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plugin_dict = deepspeed_config(config, world)
    share = make_share(config, rank, world)
    require(config)
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
    runtime = Runtime(
        accelerator=accelerator,
        rank=rank,
        world=world,
        device=accelerator.device,
        dtype=dtype,
        zero_stage=int(plugin_dict["zero_optimization"]["stage"]),
        share=share,
    )
    for remark in [] if config.distributed.deepspeed in PRESETS else remarks(config.distributed.deepspeed):
        say(runtime, remark)
    return runtime


def is_main_process() -> bool:
    """True on the one process of a group that prints and writes."""
    return torch.distributed.get_rank() == 0


def leave() -> None:
    """Leave the process group, at the end of a run; a group of one stays to the end of the process.

    Other runs of the process may follow, and DeepSpeed goes on with the group that it met first.
    """
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_world_size() > 1:
        torch.distributed.destroy_process_group()
    else:
        atexit.unregister(_leave_alone)
        atexit.register(_leave_alone)


def _leave_alone() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
