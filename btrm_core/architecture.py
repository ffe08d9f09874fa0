"""A model's shape from its configuration alone: exact parameter counts and the widths that activations depend on.

Decides: which architectures are understood (dense decoders whose layers are one attention and one MLP, all alike). The
model is built on PyTorch's meta device, so a 70B model is read as fast as a toy and without its weights.
"""

from __future__ import annotations

import copy
from typing import Any

from btrm_core.errors import BtrmError
from btrm_core.memory import Parameters, Shape


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
            hf = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    except (ValueError, LookupError, AttributeError, TypeError, ImportError, RuntimeError) as error:
        raise BtrmError(
            f"cannot plan for model type {kind!r}: transformers builds no sequence-classification model from its "
            f"configuration ({str(error).splitlines()[0][:120]}); expected a decoder such as llama, mistral or gemma"
        ) from error
    if not isinstance(getattr(hf, "score", None), nn.Linear):
        raise _unknown(kind, f"{type(hf).__name__} has no linear head called `score`")
    layers = getattr(hf.base_model, "layers", None)
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
        tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
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
    classes = {type(m).__name__ for m in norms.values()}
    if any("LayerNorm" in name for name in classes):
        norm = "layer"
    else:
        norm = "rms-fp32" if any(name.startswith(("Gemma", "Olmo")) for name in classes) else "rms"
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


def _unknown(kind: str, why: str) -> BtrmError:
    return BtrmError(
        f"cannot plan for model type {kind!r}: {why}; expected a dense decoder such as llama, mistral, gemma or qwen3"
    )
