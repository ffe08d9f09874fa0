"""What the tests of exactness share: how two ways of computing rewards and gradients are compared, and how closely."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from btrm_core.model.reward import RewardModel
from support.tiny_models import CONFIGS, SOFTCAPPED, largest_difference, tiny_model, true_float64

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
DEFAULT = {name: "eager" if name in SOFTCAPPED else "varlen" for name in CONFIGS}
OTHERS = [
    (name, kernel)
    for name in CONFIGS
    for kernel in ("sdpa", "eager")
    if name not in SOFTCAPPED and DEFAULT[name] != kernel
]

Results = tuple[torch.Tensor, dict[str, torch.Tensor]]


def precisely(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return true_float64() if dtype == torch.float64 else contextlib.nullcontext()


def difference(left: Results, right: Results) -> float:
    return max(float((left[0] - right[0]).abs().max()), largest_difference(left[1], right[1]))


def reward_model(
    name: str, kernel: str, dtype: torch.dtype, *, checkpointing: bool = False, **changes: Any
) -> RewardModel:
    hf = tiny_model(name, dtype, **changes)
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    return RewardModel(hf, kernel).train()
