"""What processes that share a row send each other, with its gradient: rows of numbers, and a sum.

All processes call these equally often and in the same order, in the forward pass, in the backward pass, and where a
checkpointed layer computes its forward pass again. Gradients are neither averaged nor added up here: each process has
the gradient of the loss with respect to its own part, and the optimiser's reduction adds the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor


def exchange(lines: Tensor, send: Sequence[int], receive: Sequence[int], processes: Any) -> Tensor:
    """Send a block of lines to every process, and get one from each.

    Gloo and NCCL both have this operation for blocks of different sizes.

    Args:
        lines: [sum of send, W], the blocks one after another, in the order of the processes.
        send: lines for each process.
        receive: lines from each process; what a process receives from another is what that one sends it.
        processes: the torch process group.

    Returns:
        [sum of receive, W], the blocks in the order of the processes. Its gradient goes back the same ways.
    """
    moved: Tensor = _Exchange.apply(lines, tuple(send), tuple(receive), processes)  # type: ignore[no-untyped-call]
    return moved


def total(values: Tensor, processes: Any) -> Tensor:
    """Add tensors of equal shape up over the processes.

    Args:
        values: of this process; not changed.
        processes: the torch process group.

    Returns:
        The sum, of the same shape, on every process. All of them go on to compute the same loss from it, so the
        gradient of each one's own values is the gradient of the sum, and nothing is sent for it.
    """
    added: Tensor = _Total.apply(values, processes)  # type: ignore[no-untyped-call]
    return added


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lines: Tensor, send: tuple[int, ...], receive: tuple[int, ...], processes: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.processes = send, receive, processes
        return _moved(lines, send, receive, processes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _moved(gradients[0], ctx.receive, ctx.send, ctx.processes), None, None, None


def _moved(lines: Tensor, send: tuple[int, ...], receive: tuple[int, ...], processes: Any) -> Tensor:
    found = lines.new_empty((sum(receive), *lines.shape[1:]))
    torch.distributed.all_to_all_single(found, lines.contiguous(), list(receive), list(send), group=processes)
    return found


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Any) -> Tensor:
        added = values.clone()
        torch.distributed.all_reduce(added, group=processes)
        return added

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
