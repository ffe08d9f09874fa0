"""The DeepSpeed engine around the reward model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from btrm_core.config import settled
from btrm_core.console import LongWork
from btrm_core.errors import BtrmError, ConfigError, TrainingError, first_line
from btrm_core.model import OPTIMIZERS, RewardModel, parameter_groups
from btrm_core.model import optimizer as model_optimizer
from btrm_core.settings import RunConfig
from btrm_core.training.processes import PRESETS, Runtime


def make_engine(model: RewardModel, config: RunConfig, runtime: Runtime) -> Any:
    """Wrap the reward model in DeepSpeed with AdamW over two parameter groups.

    Args:
        model: The reward model on the host, adapters and frozen weights settled; the engine moves it to its device.
        config: Resolved settings: weight decay, learning rate, optimizer.
        runtime: This process; its Accelerate holds the DeepSpeed configuration.

    Returns:
        The DeepSpeed engine; its `module` is `model`, and calling it computes rewards.

    Raises:
        ConfigError: an 8-bit optimizer cannot be had, or DeepSpeed does not start with the user's own file.
    """
    from accelerate.utils import DummyOptim

    groups = parameter_groups(model, settled(config.train.weight_decay, "train.weight_decay"))
    optimizer: Any = DummyOptim(groups, lr=config.train.learning_rate)  # DeepSpeed makes torch's own
    if config.train.optimizer in OPTIMIZERS:
        optimizer = model_optimizer(groups, config.train, runtime.world)
    try:
        with LongWork("starting DeepSpeed"):
            engine, _ = runtime.accelerator.prepare(model, optimizer)
    except Exception as error:
        own = config.distributed.deepspeed
        if own in PRESETS or isinstance(error, BtrmError | torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        raise ConfigError(
            f"DeepSpeed does not start with {own}: {first_line(error)}; change the file, or use --deepspeed "
            f"{', '.join(PRESETS)}"
        ) from error
    return engine


@contextlib.contextmanager
def start_engine(model: RewardModel, config: RunConfig, runtime: Runtime) -> Iterator[Any]:
    """The DeepSpeed engine around a model while a run lasts; its memory is given back at the end.

    Args:
        model: The reward model, on the host.
        config: Resolved settings.
        runtime: This process.

    Raises:
        ConfigError: as `make_engine`.
        TrainingError: the GPU's memory does not suffice for weights and optimizer, the first checks or an evaluation.
    """
    try:
        engine = make_engine(model, config, runtime)
        try:
            yield engine
        finally:
            engine.destroy()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU is out of memory outside the steps of training ({first_line(error)}); try --deepspeed zero3 or "
            "zero3-offload, --lora-rank, or a smaller --tokens-per-batch (`btrm plan` says what fits)"
        ) from error
