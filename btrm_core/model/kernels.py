"""The attention kernels, each a plain function of queries, keys, values and a `Visibility`.

All return [1, T, heads, V], V the width of a head's values, and compute the same numbers; `attention` decides which is
used. Two traps are avoided. Merging separate attention calls by their log-sum-exp is not differentiable through torch's
kernels (silently); one call over gathered keys needs no merging. And slicing queries, keys and values per run makes
autograd add up one full-size gradient per slice, twice the time of the attention itself; `split` does not.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from btrm_core.packing import Visibility

Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)


class _GatherPaths(torch.autograd.Function):
    """Gathers keys or values [T, kv_heads, D] to [K, kv_heads, D]: the path of every run, then its own tokens.

    The gradient is gathered back rather than scattered: the keys that a token is for its readers lie next to each
    other and are added up in one fixed order, in at least float32, without atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, visibility: Visibility) -> Tensor:
        assert visibility.key_index_K is not None
        ctx.visibility = visibility
        return rows.index_select(0, visibility.key_index_K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        visibility: Visibility = ctx.visibility
        assert visibility.own_index_T is not None
        total = gradient.index_select(0, visibility.own_index_T)
        for tokens, keys in visibility.readers:
            read = gradient.index_select(0, keys)
            total.index_copy_(0, tokens, read.view(len(tokens), -1, *read.shape[1:]).sum(1))
        return total, None


def _rows(states: Tensor) -> Tensor:
    """[1, heads, T, D] to [T, heads, D], the order in which projections write memory."""
    return states[0].transpose(0, 1)


def _keys(states: Tensor, visibility: Visibility) -> Tensor:
    """Keys or values of all runs, [K, kv_heads, D]."""
    rows = _rows(states)
    if visibility.key_index_K is None:
        return rows
    gathered: Tensor = _GatherPaths.apply(rows, visibility)  # type: ignore[no-untyped-call]
    return gathered


def run_loop(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, *, window: int | None, scaling: float | None
) -> Tensor:
    """PyTorch's fused attention [1, T, heads, V], one call per run.

    Plain causal runs need no mask. A run with a path before it has more keys than queries, where PyTorch aligns
    `is_causal` to the top left, so it gets a small mask, used by all layers.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: the row's runs: how many queries, which keys, which mask.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
    """
    query_lengths = [run.queries for run in visibility.runs]
    key_lengths = [run.keys for run in visibility.runs]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    parts = zip(
        visibility.runs,
        torch.split(_rows(query), query_lengths),
        torch.split(_keys(key, visibility), key_lengths),
        torch.split(_keys(value, visibility), key_lengths),
        strict=True,
    )
    for run, queries, keys, values in parts:
        plain = visibility.is_plain(run, window)
        mask = None if plain else visibility.run_mask(run, window, query.dtype)
        output = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=plain,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def dense(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, *, window: int | None, scaling: float | None
) -> Tensor:
    """PyTorch's attention [1, T, heads, V] with the whole T x T mask.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: gives the mask of the whole row; the plainest reference, whose memory grows with T squared.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
    """
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visibility.visible(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """Attention [1, T, heads, V] written out run by run: scores, soft-cap, softmax in at least float32, sum.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: the row's runs, each with its mask.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
        softcap: c of c * tanh(score / c), Gemma 2's cap on scores (arXiv:2408.00118, section 2); None is none.
    """
    query_lengths = [run.queries for run in visibility.runs]
    key_lengths = [run.keys for run in visibility.runs]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kv_heads = key.shape[1]
    group = query.shape[1] // kv_heads
    # Softmax in float32 is what transformers does; a float64 model stays in float64.
    precise = torch.float32 if query.dtype in HALF else None
    outputs = []
    parts = zip(
        visibility.runs,
        torch.split(_rows(query), query_lengths),
        torch.split(_keys(key, visibility), key_lengths),
        torch.split(_keys(value, visibility), key_lengths),
        strict=True,
    )
    for run, queries, keys, values in parts:
        # All query heads of a key head in one matrix: no copies of keys and values are needed.
        lines = queries.view(-1, kv_heads, group, queries.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.matmul(lines, keys.permute(1, 2, 0)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = visibility.run_mask(run, window, torch.bool).logical_not()
        scores = scores.view(kv_heads, group, *hidden.shape).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1, dtype=precise).to(query.dtype).flatten(1, 2)
        output = torch.matmul(weights, values.transpose(0, 1)).view(kv_heads, group, run.queries, -1)
        outputs.append(output.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)[None]


def varlen(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, *, window: int | None, scaling: float | None
) -> Tensor:
    """Torch's variable-length flash attention [1, T, heads, V] on half-precision CUDA tensors, else the run loop.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: where the queries and keys of each run begin, on the device.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
    """
    if not query.is_cuda or query.dtype not in HALF:
        return run_loop(query, key, value, visibility, window=window, scaling=scaling)
    from torch.nn.attention.varlen import varlen_attn

    keys, values = _keys(key, visibility), _keys(value, visibility)
    options, native_groups = varlen_options(frozenset(inspect.signature(varlen_attn).parameters), window)
    group = query.shape[1] // key.shape[1]
    if group > 1 and native_groups:
        options["enable_gqa"] = True
    elif group > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    output: Any = varlen_attn(
        _rows(query),
        keys,
        values,
        visibility.query_starts,
        visibility.key_starts,
        visibility.max_queries,
        visibility.max_keys,
        scale=scaling,
        **options,
    )
    return cast("Tensor", output)[None]


def varlen_options(parameters: frozenset[str], window: int | None) -> tuple[dict[str, Any], bool]:
    """How to ask this torch's `varlen_attn` for causal attention with a window.

    Args:
        parameters: the names of its parameters: `is_causal` came first, then `window_size`, then `enable_gqa`.
        window: the sliding window as transformers counts it (the token itself included), or None.

    Returns:
        The keyword arguments, and whether it takes fewer key heads than query heads.

    Raises:
        NotImplementedError: this torch's version has no sliding window.
    """
    if "window_size" in parameters:
        options: dict[str, Any] = {"window_size": (-1, 0) if window is None else (window - 1, 0)}
    elif window is None:
        options = {"is_causal": True}
    else:
        raise NotImplementedError("this version of torch has no variable-length attention with a sliding window")
    return options, "enable_gqa" in parameters


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """The flash-attn package's variable-length attention [1, T, heads, V]; half precision on CUDA only.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: where the queries and keys of each run begin, on the device.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
        softcap: c of c * tanh(score / c), Gemma 2's cap on scores (arXiv:2408.00118, section 2); None is none.
    """
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        _rows(query),
        _keys(key, visibility),
        _keys(value, visibility),
        visibility.query_starts,
        visibility.key_starts,
        visibility.max_queries,
        visibility.max_keys,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        **({} if softcap is None else {"softcap": softcap}),
    )
    return output[None]


def flash_version() -> tuple[int, ...] | None:
    """The installed flash-attn package's version, or None when it cannot be imported."""
    try:
        import flash_attn  # noqa: F401

        version = importlib.metadata.version("flash-attn")
    except (ImportError, OSError):  # OSError: a wheel built for another torch fails to load
        return None
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled.

    Un-compiled, a non-linear score function under checkpointing gives wrong gradients, silently: a full graph is an
    error where torch would go on un-compiled. The second row length makes the graph dynamic (at most four graphs);
    asking for that at once makes the soft-cap a symbol, which fails.
    """
    from torch.nn.attention.flex_attention import flex_attention

    # The CPU has no kernel with gradients; ahead-of-time tracing alone follows the same path there.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return cast("Callable[..., Tensor]", torch.compile(flex_attention, backend=backend, fullgraph=True))


@functools.cache
def _softcap_score(softcap: float) -> Callable[..., Tensor]:
    """The soft-cap as a score function; one object per value, so graphs are reused."""

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Tensor:
    """FlexAttention [1, T, heads, V] over the row's block mask; T must be a multiple of 128.

    Args:
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D].
        value: [1, kv_heads, T, V].
        visibility: gives the block mask, which the host builds.
        window: tokens that a token sees, itself included; None sees all.
        scaling: factor on the scores; None is 1/sqrt(D).
        softcap: c of c * tanh(score / c), Gemma 2's cap on scores (arXiv:2408.00118, section 2); None is none.
    """
    output = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _softcap_score(softcap),
        block_mask=visibility.block_mask(window),
        kernel_options={"IS_DIVISIBLE": True},  # by 128, which torch cannot know of a length that changes
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()
