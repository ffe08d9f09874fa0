"""What an architecture is made of, read from its configuration: parameters, FLOPs, and the peak of a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btrm_core.errors import BtrmError, CheckpointError, first_line

if TYPE_CHECKING:
    import torch

    from btrm_core.chat import ChatFormat


@dataclass(frozen=True)
class Parameters:
    """Exact parameter counts of a reward model; `norm` is not part of `layers`, and `adapters` not of the others."""

    embedding: int
    layers: int
    """Linear weights and biases of all decoder layers."""
    norm: int
    """All norm weights, the final norm included."""
    head: int
    per_layer: int
    """One decoder layer with its norms."""
    largest: int
    """The largest single tensor, in most models the token embedding."""
    small: int
    """Sum over the tensors of at most 100,000 elements (`stage3_param_persistence_threshold`)."""
    adapters: int = 0
    """Weights that LoRA adds; 0 trains everything."""
    packed: int = 0
    """How many of `layers` are kept in 4 bits."""

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return self.embedding + self.layers + self.norm + self.head + self.adapters

    @property
    def trainable(self) -> int:
        """What the optimizer holds: everything, or adapters and head under LoRA."""
        return self.adapters + self.head if self.adapters else self.total


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder that its activations depend on."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool
    """Gate and up projection (SwiGLU, GeGLU) instead of one projection with an activation."""
    norm_widths: tuple[int, ...]
    """Elements per token that each norm of one layer sees (hidden, or heads x head_dim for query and key norms)."""
    norm: str
    """"rms" (Llama: computed in fp32, scaled after rounding), "rms-fp32" (Gemma: scaled in fp32) or "layer"."""
    windows: tuple[int | None, ...]
    """Attention window of each layer in tokens; None sees everything. Its length is the number of layers."""
    linears: int
    """Linear modules per layer."""


def training_flops(parameters: Parameters, shape: Shape, tokens: float, entries: Sequence[float]) -> float:
    """Minimal floating-point operations of forward and backward, each once, nothing recomputed; a multiply-add is two.

    6 per matrix parameter and token, 4 when it is frozen (no weight gradient); embeddings are looked up, not
    multiplied. Each attention entry costs 12 x heads x head_dim: scores and weighted values, forward and twice that
    backward.

    Args:
        parameters: the counts.
        shape: the widths.
        tokens: tokens that pass through the layers.
        entries: visible (query, key) entries of each layer.

    Returns:
        Floating-point operations.

    Reference:
        Kaplan et al., arXiv:2001.08361, section 2.1.
    """
    per_parameter = 4 if parameters.adapters else 6
    dense = (per_parameter * parameters.layers + 6 * parameters.adapters) * tokens
    return dense + 12.0 * shape.heads * shape.head_dim * sum(entries)


def flops_per_token(parameters: Parameters, shape: Shape, sequence: float) -> float:
    """Minimal floating-point operations per trained token; see `training_flops`.

    Args:
        parameters: the counts.
        shape: the widths.
        sequence: tokens of a typical conversation, of which a token sees half on average.
    """
    return training_flops(parameters, shape, 1, [min(sequence, window or sequence) / 2 for window in shape.windows])


def causal_entries(length: int, window: int | None = None) -> int:
    """Visible (query, key) entries of one causal sequence.

    Args:
        length: its tokens.
        window: tokens that a token sees, itself included; None is all before it.

    >>> causal_entries(4), causal_entries(4, window=2)
    (10, 7)
    """
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


# Dense bf16 TFLOP/s from the vendor's data sheets (without sparsity) and the memory in GiB that PyTorch sees.
GPUS: dict[str, tuple[float, float]] = {
    "h100": (989, 79.1),
    "h200": (989, 139.7),
    "b200": (2250, 178.4),
    "a100": (312, 79.1),
    "a100-40gb": (312, 39.4),
    "l40s": (362, 44.4),
    "4090": (165, 23.6),
}


def peak_flops(device_name: str) -> float | None:
    """The dense bf16 peak of a GPU.

    Args:
        device_name: as CUDA names it, e.g. "NVIDIA H100 80GB HBM3".

    Returns:
        FLOP/s; None for a GPU that is not in the table.
    """
    words = device_name.lower().replace("-", " ").split()
    name = next((gpu for gpu in GPUS if gpu in words), None)
    return None if name is None else GPUS[name][0] * 1e12


def read_shape(config: Any, lora_rank: int | None = None, four_bits: bool = False) -> tuple[Parameters, Shape]:
    """Build the reward model on the meta device (no memory, no weights) and read off its counts and widths.

    Args:
        config: a transformers configuration.
        lora_rank: rank of adapters on every linear layer.
        four_bits: the weights of linear layers are kept in 4 bits.

    Raises:
        BtrmError: transformers has no sequence-classification model for it, or its layers are not attention and MLP.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForSequenceClassification

    kind = getattr(config, "model_type", type(config).__name__)
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            hf = AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
    except Exception as error:  # a model's own
        raise BtrmError(
            f"cannot plan for model type {kind!r}: transformers builds no sequence-classification model from its "
            f"configuration ({first_line(error)[:120]}); expected a decoder with the usual names"
        ) from error
    if not isinstance(getattr(hf, "score", None), nn.Linear):
        raise _unknown(kind, f"{type(hf).__name__} has no linear head called `score`")
    layers = getattr(getattr(hf.base_model, "language_model", hf.base_model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise _unknown(kind, "it has no list `layers` of decoder layers")
    layer = layers[0]
    norms = [m for m in hf.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")]
    norm = sum(p.numel() for m in norms for p in m.parameters(recurse=False))
    embedding = sum(p.numel() for m in hf.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    head = sum(p.numel() for p in hf.score.parameters())
    numels = [p.numel() for p in hf.parameters()]
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    adapters = (lora_rank or 0) * len(layers) * sum(m.in_features + m.out_features for m in linears)
    sizes = {sum(p.numel() for p in each.parameters()) for each in layers}
    if len(sizes) > 1:
        raise _unknown(kind, "its layers differ in size")
    parameters = Parameters(
        embedding=embedding,
        layers=sum(numels) - embedding - norm - head,
        norm=norm,
        head=head,
        per_layer=sizes.pop(),
        largest=max(numels),
        small=sum(n for n in numels if n <= 100_000),
        adapters=adapters,
        packed=len(layers) * sum(m.weight.numel() for m in linears) if four_bits else 0,
    )
    return parameters, _shape(kind, config.get_text_config(), layer, len(layers), len(linears))


def _shape(kind: str, config: Any, layer: Any, layers: int, linears: int) -> Shape:
    names = {name.rpartition(".")[2]: module for name, module in layer.named_modules()}
    attention = "o_proj" in names and ("qkv_proj" in names or {"q_proj", "k_proj", "v_proj"} <= set(names))
    mlp = [name for name in ("down_proj", "fc2", "c_proj") if name in names]
    if not attention or not mlp or any(p.ndim > 2 for p in layer.parameters()) or "experts" in names:
        raise _unknown(kind, "its layers are not one attention and one dense MLP")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    special = {"q_norm": heads * head_dim, "k_norm": kv_heads * head_dim}
    norms = {name: m for name, m in names.items() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
    if any("LayerNorm" in type(m).__name__ for m in norms.values()):
        norm = "layer"
    else:
        norm = "rms-fp32" if any(map(_scales_in_fp32, norms.values())) else "rms"
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return Shape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=names[mlp[0]].in_features,
        gated="gate_proj" in names or "gate_up_proj" in names,
        norm_widths=tuple(special.get(name, m.weight.numel()) for name, m in norms.items()),
        norm=norm,
        windows=tuple(window if t == "sliding_attention" else None for t in types),
        linears=linears,
    )


def _scales_in_fp32(norm: Any) -> bool:
    """Whether a root-mean-square norm multiplies by its weight before it goes back to the type of its input.

    Asked of the norm itself: with an fp32 weight, one that goes back first gives fp32 for a bf16 input.
    """
    import torch

    asked = copy.deepcopy(norm).to(device="meta", dtype=torch.float32)
    given = torch.empty(1, asked.weight.numel(), dtype=torch.bfloat16, device="meta")
    return bool(asked(given).dtype == torch.bfloat16)


def _unknown(kind: str, why: str) -> BtrmError:
    return BtrmError(f"cannot plan for model type {kind!r}: {why}; expected a dense decoder with the usual names")


def mfu_per_token_rate(
    config: Any, device_name: str, world: int, tokens_per_conversation: float, lora_rank: int | None = None
) -> float | None:
    """MFU in percent for one computed token a second over all processes; None where it cannot be said.

    Counts the minimal operations of forward and backward (nothing recomputed, no padding left out) against the dense
    bf16 peak of the GPU (Chowdhery et al., arXiv:2204.02311, appendix B).

    Args:
        config: the model's transformers configuration.
        device_name: as CUDA names it, e.g. "NVIDIA H100 80GB HBM3".
        world: number of GPUs.
        tokens_per_conversation: mean length, for the attention's part.
        lora_rank: rank of adapters, whose frozen base needs no weight gradients.
    """
    peak = peak_flops(device_name)
    if peak is None:
        return None
    try:
        parameters, shape = read_shape(config, lora_rank)
    except BtrmError:
        return None
    return 100.0 * flops_per_token(parameters, shape, tokens_per_conversation) / (peak * world)


def device_name(device: torch.device) -> str:
    """The device as a person names it.

    Args:
        device: of torch.
    """
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def check_vocabulary(tokenizer: Any, config: Any, name: str, written: Iterable[int | None] = ()) -> None:
    """Refuse a tokenizer that writes ids for which the model has no embedding.

    Control tokens that nothing writes may lie beyond the end, as Gemma 3's for images does.

    Args:
        tokenizer: the tokenizer in use.
        config: the model's transformers config.
        name: the model, for the message.
        written: ids that the template writes.

    Raises:
        CheckpointError: says which token is the first without a row.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None or len(tokenizer) <= size:
        return
    added = tokenizer.added_tokens_decoder
    new = tokenizer.pad_token_id if len(tokenizer) - 1 == tokenizer.pad_token_id else None  # gets a row of its own
    beyond = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if index >= size and index != new and (index in written or index not in added or not added[index].special)
    }
    if beyond:
        first = min(beyond)
        raise CheckpointError(
            f"the tokenizer of {name} has {len(tokenizer):,} tokens, but the model has embeddings for {size:,}: "
            f"{beyond[first]!r} is {first}; expected the tokenizer that the model was trained with, or a model that "
            "was resized for this one"
        )


def check_ids(chat: ChatFormat, config: Any, name: str) -> None:
    """Refuse a format whose ids a model has no embeddings for; see `check_vocabulary`.

    Args:
        chat: the format; the beginning, terminal and anchor tokens that its template writes are looked up.
        config: the model's transformers configuration.
        name: the model, for the message.
    """
    written = {chat.bos_id, chat.terminal_id, *(chat.encoder.controls[anchor] for anchor in chat.anchors)}
    check_vocabulary(chat.tokenizer, config, name, written)
