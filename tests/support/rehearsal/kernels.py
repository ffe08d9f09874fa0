"""Attention kernels that exist on a GPU alone, with what they refuse: flash-attn's, and those under torch's varlen.

Their numbers are those of attention written out in float32, rounded once; causal from the bottom right.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import math
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from support.rehearsal import gpu

Tensor = torch.Tensor
CALLS: list[str] = []
"""Names of the kernels that were called."""


@dataclass(frozen=True)
class Segments:
    """Which queries meet which keys, and how."""

    queries: list[int]
    keys: list[int]
    scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float

    def parts(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Segment after segment [heads, length, D] in float32, of tensors with a line for each query, or each key."""
        heads = of_queries[0].shape[1]

        def split(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
            wide = tensor.float().repeat_interleave(heads // tensor.shape[1], 1, output_size=heads)
            return [part.transpose(0, 1) for part in wide.split(lengths)]

        columns = [split(tensor, self.queries) for tensor in of_queries]
        return zip(*columns, *(split(tensor, self.keys) for tensor in of_keys), strict=True)

    def weights(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Attention weights of a segment, and the derivative of its capped scores by the plain ones."""
        score = query @ key.transpose(1, 2) * self.scale
        slope = torch.ones_like(score)
        if self.softcap:
            capped = torch.tanh(score / self.softcap)
            score, slope = capped * self.softcap, 1 - capped.square()
        rows, columns = score.shape[1:]
        distance = torch.arange(rows, device=score.device)[:, None] + (columns - rows)
        distance = distance - torch.arange(columns, device=score.device)[None]
        left, right = self.window[0], 0 if self.causal else self.window[1]
        if right >= 0:
            score = score.masked_fill(distance < -right, -math.inf)
        if left >= 0:
            score = score.masked_fill(distance > left, -math.inf)
        return score.softmax(-1).nan_to_num(0.0), slope


def _demand(true: Any, what: str) -> None:
    if not true:
        raise RuntimeError(f"{what} (rehearsed)")


def checked(query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int]) -> Any:
    """Refuse what FlashAttention 2 refuses, and what it would read beyond; lengths of the segments otherwise."""
    for tensor in (query, key, value, *starts):
        _demand(tensor.is_cuda, "Input tensor must be on CUDA device")
    _demand(query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _demand(query.dtype == key.dtype == value.dtype, "query and key must have the same dtype")
    for tensor in (query, key, value):
        _demand(tensor.dim() == 3, "expected [tokens, heads, head_dim]")
        _demand(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    head = query.shape[-1]
    _demand(
        head <= 256 and head % 8 == 0, f"FlashAttention forward only supports head dimension at most 256, not {head}"
    )
    _demand(query.shape[1] % key.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")
    _demand(key.shape == value.shape, "key and value must have the same shape")
    for tensor in starts:
        _demand(tensor.dtype == torch.int32, "cu_seqlens must have dtype int32")
        _demand(tensor.is_contiguous(), "cu_seqlens must be contiguous")
    _demand(starts[0].shape == starts[1].shape, "cu_seqlens_q and cu_seqlens_k must have the same length")
    _demand(all(type(length) is int for length in longest), "max_seqlen must be a number of the host")
    with gpu.inside_a_kernel():
        lengths = [tensor.cpu().diff().tolist() for tensor in starts]
    for tensor, own, most in zip((query, key), lengths, longest, strict=True):
        _demand(sum(own) == len(tensor), f"cu_seqlens end at {sum(own)}, and there are {len(tensor)} rows")
        _demand(max(own) <= most, f"max_seqlen is {most}, and a sequence has {max(own)} tokens")
    return lengths


def forward(query: Tensor, key: Tensor, value: Tensor, how: Segments) -> Tensor:
    """Attention [tokens, heads, D] of all segments."""
    made = []
    for q, k, v in how.parts([query], [key, value]):
        weights, _ = how.weights(q, k)
        made.append((weights.to(query.dtype).float() @ v).transpose(0, 1))
    return torch.cat(made).to(query.dtype)


def backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, how: Segments) -> tuple[Tensor, ...]:
    """The gradients of queries, keys and values."""
    _demand(gradient.stride(-1) == 1, "dout tensor must have contiguous last dimension")
    made: tuple[list[Tensor], ...] = ([], [], [])
    heads, key_heads = query.shape[1], key.shape[1]
    for q, d, k, v in how.parts([query, gradient], [key, value]):
        weights, slope = how.weights(q, k)
        of_weights = d @ v.transpose(1, 2)
        of_score = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * slope * how.scale
        grouped = [
            tensor.unflatten(0, (key_heads, heads // key_heads)).sum(1)
            for tensor in (of_score.transpose(1, 2) @ q, weights.transpose(1, 2) @ d)
        ]
        for place, tensor in zip(made, (of_score @ k, *grouped), strict=True):
            place.append(tensor.transpose(0, 1))
    return tuple(torch.cat(parts).to(query.dtype) for parts in made)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: Segments) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.how = how
        return forward(query, key, value, how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(gradients[0], *ctx.saved_tensors, ctx.how), None)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """flash-attn's own signature, as far as btrm uses it."""
    lengths = checked(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    CALLS.append("flash")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    made: Tensor = _FlashAttention.apply(q, k, v, Segments(*lengths, scale, causal, window_size, softcap))
    return made


def install_flash_attn(version: str = "2.8.3") -> None:
    """Let `import flash_attn` find this."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    sys.modules["flash_attn"] = module
    of = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name in ("flash-attn", "flash_attn") else of(name)


def install_varlen() -> torch.library.Library:
    """The kernels that `torch.nn.attention.varlen` calls; keep what is returned."""

    def how(q: Tensor, k: Tensor, v: Tensor, starts: Any, longest: Any, causal: bool, options: Any) -> Segments:
        lengths = checked(q, k, v, starts, longest)
        left, right = (options.get(f"window_size_{side}") for side in ("left", "right"))
        window = (-1 if left is None else left, -1 if right is None else right)
        scale = options.get("scale")
        return Segments(*lengths, q.shape[-1] ** -0.5 if scale is None else scale, causal, window, 0.0)

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sq: Tensor,
        sk: Tensor,
        mq: int,
        mk: int,
        p: float,
        causal: bool,
        debug: bool,
        **o: Any,
    ) -> tuple[Tensor, ...]:
        CALLS.append("varlen")
        made = forward(q, k, v, how(q, k, v, (sq, sk), (mq, mk), causal, o))
        sums = torch.zeros(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        nothing = torch.empty(0, device=q.device)
        return made, sums, torch.zeros(2, dtype=torch.uint64, device=q.device), nothing, nothing

    def attend_backward(
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        sums: Tensor,
        sq: Tensor,
        sk: Tensor,
        *rest: Any,
        **o: Any,
    ) -> tuple[Tensor, ...]:
        mq, mk, _, causal = rest[:4]
        return backward(g, q, k, v, how(q, k, v, (sq, sk), (mq, mk), causal, o))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", attend, "CUDA")
    library.impl("_flash_attention_backward", attend_backward, "CUDA")
    return library
