"""The DeepSpeed engine around the reward model."""

from __future__ import annotations

from typing import Any

from btrm_core.model import OPTIMIZERS, RewardModel, parameter_groups
from btrm_core.model import optimizer as model_optimizer
from btrm_core.settings import RunConfig
from btrm_core.training.processes import Runtime


def make_engine(model: RewardModel, config: RunConfig, runtime: Runtime) -> Any:
    """Wrap the reward model in DeepSpeed with AdamW over two parameter groups.

    Raises:
        ConfigError: an 8-bit optimizer cannot be had.
    """
    from accelerate.utils import DummyOptim

    groups = parameter_groups(model, float(config.train.weight_decay or 0.0))
    optimizer: Any = DummyOptim(groups, lr=config.train.learning_rate)  # DeepSpeed makes torch's own
    if config.train.optimizer in OPTIMIZERS:
        optimizer = model_optimizer(groups, config.train, runtime.world)
    engine, _ = runtime.accelerator.prepare(model, optimizer)
    return engine
