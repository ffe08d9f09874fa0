"""Floating-point operations of a training step, counted two ways.

*Minimal*: what any exact trainer must do for the pairs (every shared token once, no padding, no recomputation).
Counting utilisation in minimal FLOPs lets different layouts be compared: wasted work does not raise it.
*Hardware*: what the arm did, padding and recomputation included.
A multiply-add counts as two; the vocabulary is never read by a reward model, so embeddings count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Dense bf16 peaks without sparsity, from the makers' data sheets, in FLOP/s.
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, None when it is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if name in gpu_name), None)


def causal_entries(length: int, window: int | None = None) -> int:
    """Visible (query, key) entries of one causal sequence, optionally with a sliding window."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def shared_entries(shared: int, tails: Sequence[int], window: int | None = None) -> int:
    """Visible entries when the common prefix of several sequences is computed once."""
    prefix = causal_entries(shared, window)
    return prefix + sum(causal_entries(shared + tail, window) - prefix for tail in tails)


def training_flops(config: Any, parameters: int, tokens: int, entries_by_window: dict[int | None, int]) -> float:
    """FLOPs of forward and backward.

    Args:
        config: transformers text config.
        parameters: backbone parameters without embeddings.
        tokens: tokens that pass through the layers.
        entries_by_window: for each distinct window of the model's layers (None: full attention), the visible
            attention entries summed over sequences.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_entry = 4 * head_dim * config.num_attention_heads  # scores and weighted values
    windows = layer_windows(config)
    attention: int = sum(per_entry * entries_by_window[window] for window in windows)
    return 3.0 * (2.0 * parameters * tokens + attention)


def layer_windows(config: Any) -> list[int | None]:
    """Sliding window of each layer, None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
