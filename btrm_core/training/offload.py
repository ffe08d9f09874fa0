"""Keeping activations in the CPU's memory between the forward and the backward pass.

Decides: what is moved. Weights and small tensors stay: autograd saves the weight of every linear layer too, and moving
those would cost a copy of the model for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1024
"""Elements of the smallest tensor worth moving."""


class Activations:
    """Hooks for what autograd saves; `moved` counts the elements that went to the CPU.

    Args:
        model: its weights, and views of them, are left where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.moved = 0
        self._weights: set[int] = set()

    def on_cpu(self) -> AbstractContextManager[Any]:
        """While active, what a forward pass saves for its backward pass goes to the CPU and comes back when needed."""
        # weights may have moved since the last micro-batch, e.g. when the engine flattened them
        self._weights = {w.untyped_storage().data_ptr() for w in self.model.parameters()}
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.numel() < SMALLEST or self._is_weight(tensor):
            return None, tensor
        self.moved += tensor.numel()
        pinned = tensor.is_cuda
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=pinned)
        host.copy_(tensor.detach(), non_blocking=pinned)
        return tensor.device, host

    def _unpack(self, packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    def _is_weight(self, tensor: Tensor) -> bool:
        # under ZeRO-3 a weight has its storage only while it is gathered, so views are known by their base
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        return tensor.untyped_storage().data_ptr() in self._weights


def activation_context(model: nn.Module, asked: bool) -> Callable[[], AbstractContextManager[Any]]:
    """What to put around a forward pass: activations on the CPU if asked for, else nothing.

    Args:
        model: Its weights stay where they are.
        asked: The setting `model.activation_offload`.

    Returns:
        Called before each forward pass, it makes the context for that pass.
    """
    return Activations(model).on_cpu if asked else nullcontext
