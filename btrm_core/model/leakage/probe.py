"""A kernel on random queries, keys and values, large enough to show a wrong mask, window, cap, scale or order of heads.

Rewards alone cannot show that in half precision: a deep model rounds more than a wrong mask changes its rewards.

Shapes: T tokens of a made-up row, D of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch

from btrm_core.model import attention, kernels
from btrm_core.model.attention import Call
from btrm_core.model.leakage.exact import Leak
from btrm_core.packing import Batch, Visibility, grow, pack_row, row_multiple

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2, torch.float32: 2e-3, torch.float64: 1e-6}
"""Largest relative error of outputs, and of gradients, by the type that the kernel computes in."""

SPREAD = 2.0
"""Standard deviation of the scores: weights are then neither equal nor all at one key."""

WINDOW = 24
"""The window that is tried where a layer has one: the rows made up here are shorter than a model's own."""

SHAPES: tuple[tuple[int, ...], ...] = ((30, 9, 7), (0, 70), (12, 1, 25, 3), (0, 5, 4))
"""Tokens that the sequences of each tree share, then those of each alone."""


def probe(kernel: str, calls: Iterable[Call], device: torch.device, dtype: torch.dtype, training: bool) -> Leak:
    """Compare a kernel with attention written out, for everything that the layers of a model ask of it.

    Args:
        kernel: one of `attention.KERNELS`.
        calls: what the layers ask (`attention.calls_noted`).
        device: where the model computes.
        dtype: the type in which its attention computes.
        training: whether gradients are compared as well.

    Returns:
        Whether the largest relative error is within `TOLERANCE`. Attention written out is not compared with itself.
    """
    tolerance, worst = TOLERANCE[dtype], 0.0
    for call in () if kernel == "eager" else sorted(calls, key=repr):
        worst = max(worst, _error(kernel, call, device, dtype, training))
        if not worst <= tolerance:  # True for NaN
            what = f"heads of {call.head_dim}" + (f", window {call.window}" if call.window else "")
            what += f", soft-cap {call.softcap:g}" if call.softcap else ""
            text = f"its attention ({what}) differs from the same written out by {worst:.1e}, accepted {tolerance:.0e}"
            return Leak(False, text, worst, tolerance)
    return Leak(True, f"its attention is that written out (relative error {worst:.1e})", worst, tolerance)


def _error(kernel: str, call: Call, device: torch.device, dtype: torch.dtype, training: bool) -> float:
    visibility = _row(row_multiple(kernel, device.type)).to(device).visibility
    assert visibility is not None
    inputs = [part.to(device, dtype) for part in _random(call, visibility.length)]
    precise = torch.promote_types(dtype, torch.float32)
    found = _computed(kernel, call, inputs, visibility, training)
    expected = _computed("eager", call, [part.to(precise) for part in inputs], visibility, training)
    errors = [(a.to(precise) - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())


def _computed(
    kernel: str, call: Call, inputs: list[torch.Tensor], visibility: Visibility, training: bool
) -> list[torch.Tensor]:
    """The output [1, T, heads, D] and, in training, the gradients of queries, keys and values."""
    options = {} if call.softcap is None else {"softcap": call.softcap}
    function: Callable[..., torch.Tensor] = kernels.eager if kernel == "eager" else attention.FUNCTIONS[kernel]
    window = None if call.window is None else min(call.window, WINDOW)
    *leaves, weights = (part.detach().requires_grad_(training) for part in inputs)
    with torch.set_grad_enabled(training):
        states = [leaf.transpose(1, 2) for leaf in leaves]
        output = function(*states, visibility, window=window, scaling=call.scaling, **options)
    gradients = torch.autograd.grad(output, leaves, weights.detach()) if training else ()
    return [output.detach(), *gradients]


@functools.cache
def _row(multiple_of: int) -> Batch:
    """A row with prefixes, branches, single tokens and filling."""
    rng = np.random.default_rng(0)
    trees = []
    for shared, *tails in SHAPES:
        prefix = rng.integers(3, 60, shared).tolist()
        trees.append(grow([[*prefix, 100 + n, *rng.integers(3, 60, tail).tolist()] for n, tail in enumerate(tails)]))
    return pack_row(trees, multiple_of=multiple_of).batch()


def _random(call: Call, length: int) -> list[torch.Tensor]:
    """Queries, keys, values [1, T, heads, D] and the gradient of the output.

    The scores of the last heads are far beyond a soft-cap, those of the first are below it.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [(call.heads, call.head_dim), (call.kv_heads, call.head_dim), (call.kv_heads, call.value_dim)]
    parts = [torch.randn(1, length, *size, generator=generator) for size in (*sizes, (call.heads, call.value_dim))]
    scaling = call.head_dim**-0.5 if call.scaling is None else call.scaling
    most = SPREAD if call.softcap is None else max(SPREAD, 2 * call.softcap)
    spread_H = torch.logspace(0, 1, call.heads) / 10 * most
    parts[0] *= spread_H[:, None] / (scaling * call.head_dim**0.5)
    return parts
