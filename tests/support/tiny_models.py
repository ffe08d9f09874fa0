"""Tiny real models of several architectures, and token groups with every awkward shape, for exactness tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from btrm_core.packing.trees import Tree, grow

VOCAB = 61
WINDOW = 9

SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_labels": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}),
    "qwen3": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
}
SOFTCAPPED = ("gemma2",)
WINDOWED = ("mistral", "gemma2", "qwen3", "phi3")


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A two-layer sequence classifier with weights large enough for attention to matter."""
    model_type, special = CONFIGS[name]
    config = CONFIG_MAPPING[model_type](**{**SIZE, **special, **changes})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.05
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.to(dtype)


def group(shared: int, *tails: int, seed: int = 0) -> Tree:
    """Sequences of random tokens that begin with `shared` equal ones and go on with `tails` of their own."""
    rng = np.random.default_rng([seed, shared, *tails])
    prefix = rng.integers(3, VOCAB, shared)
    made = [rng.integers(3, VOCAB, tail) for tail in tails]
    for number, tail in enumerate(made):
        tail[:1] = 3 + (number + seed) % (VOCAB - 3)  # no two tails begin alike
    return grow([np.concatenate([prefix, tail]) for tail in made])


def deep_sequences(depth: int, seed: int = 0) -> list[list[int]]:
    """Sequences of a random tree of `depth` edges: branches in two or three, ends in its midst, edges of one token."""
    rng = np.random.default_rng([depth, seed])
    found: list[list[int]] = []

    def below(path: list[int], left: int, first: int) -> None:
        path = [*path, first, *rng.integers(3, VOCAB, rng.choice([0, 0, 1, 4, 11])).tolist()]
        if left == 1 or rng.random() < 0.4:
            found.append(path)
        if left > 1:
            for number in range(int(rng.integers(2, 4))):
                below(path, left - 1, 3 + number)

    below([], depth, 3)
    order = rng.permutation(len(found))
    return [found[i] for i in order]


def deep_tree(depth: int, seed: int = 0) -> Tree:
    """The tree of `deep_sequences`."""
    return grow(deep_sequences(depth, seed))


def awkward_groups() -> list[Tree]:
    """Long prefixes, no prefix, empty and one-token tails, one response, many responses."""
    return [
        group(40, 7, 5),
        group(0, 6, 9),
        group(12, 0, 4),
        group(5, 3, 0),
        group(20, 1, 1),
        group(11, 26, 2),
        group(0, 7),
        group(18, 3, 0, 1, 12),
        group(6, 0, 0),
    ]


_CASTS = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """While active, floating tensors that are cast to float32 become float64 instead.

    transformers computes norms, rotary embeddings and softmax in float32 whatever the model's type,
    which would hide errors below 1e-6. (A `TorchFunctionMode` would do, but is off while checkpointed
    layers are recomputed.) Build models outside: their rotary frequencies are rounded to float32.
    """
    to, _, softmax = _CASTS
    swap = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.Tensor, "float", lambda self: self.double())
    patch.setattr(
        torch.Tensor, "to", lambda self, *args, **kw: to(self, *map(swap, args), **{k: swap(v) for k, v in kw.items()})
    )
    patch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **kw: softmax(x, dim, dtype=swap(dtype), **kw)
    )
    try:
        yield
    finally:
        patch.undo()


@contextlib.contextmanager
def plain_casts() -> Iterator[None]:
    """Inside `true_float64`: casts as they always are, for what `torch.compile` has to trace."""
    patch = pytest.MonkeyPatch()
    for (owner, name), cast in zip(
        ((torch.Tensor, "to"), (torch.Tensor, "float"), (torch.nn.functional, "softmax")), _CASTS, strict=True
    ):
        patch.setattr(owner, name, cast)
    try:
        yield
    finally:
        patch.undo()


def gradients(model: torch.nn.Module, rewards_S: torch.Tensor, weights_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a fixed weighting of the rewards with respect to every parameter."""
    model.zero_grad()
    (rewards_S * weights_S).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of any entry, over all parameters; infinite when one side lacks a parameter."""
    if left.keys() != right.keys():
        return float("inf")
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def weights_for(groups: Sequence[Tree], dtype: torch.dtype) -> torch.Tensor:
    """Fixed weights, one for each sequence, of either sign.

    A quarter each: the largest gradient of `awkward_groups` is then 2 to 7 for every model, about the
    largest reward, so one absolute tolerance means the same for both.
    """
    count = sum(len(g.leaf) for g in groups)
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + 0.3).to(dtype) / 4
