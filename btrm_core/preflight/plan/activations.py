"""What a step keeps of its activations for the backward pass, by arithmetic alone."""

from __future__ import annotations

import math
from typing import Literal

from btrm_core.model import Shape
from btrm_core.model import kv_copies as copies_of_keys

Kept = Literal["all", "products", "inputs"]
"""What is kept of each layer: everything, its input and what is dear to compute again, or its input alone."""


SPEED: dict[Kept, float] = {"all": 1.0, "products": 0.85, "inputs": 0.75}
"""Of the utilisation without recomputation. Everything once more makes 8 operations of every 6 (arXiv:2205.05198,
section 5); keeping the products, a step was 1.14 times as fast as that (an H100, Llama 3's shape)."""


HOW: dict[Kept, str] = {
    "all": "--no-gradient-checkpointing",
    "products": "--selective-checkpointing",
    "inputs": "--gradient-checkpointing",
}
"""The flag for each."""


def saved_per_token(
    shape: Shape, *, bf16: bool = True, kv_copies: float = 1.0, lora_rank: int | None = None, share: int = 1
) -> float:
    """Bytes that autograd keeps per token for the backward pass of one decoder layer.

    Section 4 of Korthikanti et al. (arXiv:2205.05198) adapted to today's decoders: its 34 b s h per layer has dropout,
    LayerNorm and a 4h MLP; here RMSNorm computes in fp32 and keeps two tensors, the MLP is gated (gate, activation, up
    and product: 4 tensors of the intermediate width), keys and values have kv_heads, and the 5 a s^2 b of the attention
    matrix is gone with a flash-like kernel, which keeps query, key, value, output and one fp32 log-sum-exp per head.

    Of a row that GPUs share, each keeps the whole row for its part of the heads: as many numbers per token of its own
    as without sharing, but for copied key heads; and besides, the output a second time, as the next layer reads it.
    Where keys are gathered, those received stay as well, in one block with the queries.

    Args:
        shape: the widths.
        bf16: compute type bf16; False is fp32.
        kv_copies: keys and values kept per token: above 1 when rows share prefixes and the kernel gathers them.
        lora_rank: rank of adapters on every linear layer; their frozen norms keep one tensor less.
        share: how many GPUs share a row; tokens are then those of one of them.
    """
    width = 2 if bf16 else 4
    norm = _norm_keeps(shape, width, scaled=not lora_rank)
    norms = sum(norm * n + 4 for n in shape.norm_widths)
    inputs = 2 * width * shape.hidden
    query_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if share > 1:
        kv_width *= copies_of_keys(shape.heads, shape.kv_heads, share)
        kv_copies += kv_copies > 1
    outputs = 2 if share > 1 else 1
    attention = width * ((1 + outputs) * query_width + 2 * kv_copies * kv_width) + 4 * shape.heads
    mlp = width * (4 if shape.gated else 2) * shape.intermediate
    adapters = width * (lora_rank or 0) * shape.linears
    return norms + inputs + attention + mlp + adapters


def _norm_keeps(shape: Shape, width: int, *, scaled: bool) -> int:
    """Bytes kept per element of a norm's input: the fp32 input, and what its trained weight is multiplied with."""
    if shape.norm == "layer":
        return width
    return 4 + ((4 if shape.norm == "rms-fp32" else width) if scaled else 0)


def activations(
    shape: Shape,
    tokens: int,
    *,
    kept: Kept = "all",
    bf16: bool = True,
    kv_copies: float = 1.0,
    lora_rank: int | None = None,
    share: int = 1,
) -> int:
    """Peak bytes of activations for a packed row of `tokens` tokens: kept ones plus the backward pass's own.

    Without checkpointing every layer is kept; with it only each layer's input, and one layer at a time is recomputed
    (arXiv:2205.05198, section 5); with the selective one, what matrices and attention give as well. A reward model has
    no logits: besides the layers there are the token ids, the rotary table and the final norm. The working set of the
    backward pass (16h to 24h bytes at the final norm; 1.5 tensors of the intermediate width in a recomputed layer) is
    read off simulated steps: every tensor of whole 1B to 11B models was tracked on the meta device at 8,192 tokens, and
    in bf16 the sum is within 3 % of the peak for llama, mistral, qwen2, qwen3, phi3, gemma 1 to 3, olmo2, smollm3 and
    starcoder2. On an H100, whole steps of Llama 3's shape in 8 layers took 1 % more than planned.

    Args:
        shape: the widths.
        tokens: of the row.
        kept: of each layer.
        bf16: compute type bf16; False is fp32.
        kv_copies: how often each key and value is held, 1 without shared prompts.
        lora_rank: of adapters; None trains everything.
        share: how many GPUs share the row; the bytes are those of one of them. What it sends and receives is in use
            when no more than the MLP's own tensors have gone, and smaller than these.
    """
    width = 2 if bf16 else 4
    layer = saved_per_token(shape, bf16=bf16, kv_copies=kv_copies, lora_rank=lora_rank, share=share)
    outside = 8 + 2 * width * shape.head_dim + _norm_keeps(shape, width, scaled=not lora_rank) * shape.hidden + 4
    layers = len(shape.windows)
    if kept != "all":
        held = layers * width * shape.hidden + layer
        if kept == "products":  # of the layer that is computed again they are among its own
            held += (layers - 1) * _products_per_token(shape, width, lora_rank)
        working = 1.5 * width * shape.intermediate
    else:
        held = layers * layer
        working = (24 if shape.norm == "rms-fp32" else 16) * shape.hidden
    return round(math.ceil(tokens / share) * (held + outside + working))


def _products_per_token(shape: Shape, width: int, lora_rank: int | None) -> int:
    """Bytes of what a layer's matrices (with adapters twice) and its attention give for a token."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    products = queries + 2 * keys + 2 * shape.hidden + (2 if shape.gated else 1) * shape.intermediate
    adapters = products + lora_rank * shape.linears if lora_rank else 0
    return width * (products + adapters + queries) + 4 * shape.heads
