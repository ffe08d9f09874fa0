"""What a model is made of: which architectures have a head, what mixes tokens besides attention, and dropout."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from btrm_core.errors import CheckpointError, did_you_mean
from btrm_core.model.leakage.positions import text_modules

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention", "full", "sliding", "global", "local"}
"""Kinds of layers that are attention under a mask; every other kind is refused in packed rows."""

_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "layer_block_types", "attn_type_list")

_MIXERS = re.compile(
    r"Mamba|SSM|Ssm(?![a-z])|DeltaNet|R[Ww][Kk][Vv]|Recurrent|RGLRU|RgLru|ShortConv|LinearAttention|Lightning|TokenShift"
    r"|Hyena|Retention|[xms]LSTM"
)
"""Class names of modules that carry a state or a neighbour's values from token to token."""


def token_mixers(hf: Any) -> str | None:
    """Name what mixes the tokens of a row and knows no masks: a convolution, a scan, another kind of layer; or None.

    Args:
        hf: a transformers model; its configuration is read first, then the classes of its modules.

    Returns:
        The end of a sentence that says why rows cannot be packed, for the first such thing found.
    """
    config = hf.config.get_text_config()
    for name in _LAYER_LISTS:
        kinds = getattr(config, name, None)
        if not isinstance(kinds, list | tuple):
            continue
        for kind in kinds:
            if isinstance(kind, str) and kind not in ATTENTION_LAYERS:
                return f"its layers of kind '{kind}' are neither full nor sliding attention"
    for name, module in text_modules(hf):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.RNNBase):
            return f"{name} ({type(module).__name__}) mixes tokens and knows no borders between sequences"
        if _MIXERS.search(type(module).__name__):
            return f"{name} ({type(module).__name__}) mixes tokens outside attention"
    return None


def without_dropout(hf: Any) -> list[str]:
    """Set every dropout of a model to 0, under whatever name, and let its routers draw no noise in training.

    A module that draws noise computes in training what it computes in use; its settings stay as they are, since some
    are read in use as well. Not for a model with adapters, whose dropout is asked for by a setting.

    Args:
        hf: a transformers model; its text configuration and its modules are changed in place.

    Returns:
        The settings of the configuration that were above 0 and had an effect, as `name=value`.
    """
    config = hf.config.get_text_config()
    noisy = [module for module in hf.modules() if _draws_noise(module)]
    for module in noisy:
        module.register_forward_pre_hook(_as_in_use)
    changed = [
        f"{name}={value:g}"
        for name, value in sorted(vars(config).items())
        if (_is_dropout(name) or (noisy and _NOISE in name)) and _above_0(value)
    ]
    for entry in changed:
        if _is_dropout(name := entry.partition("=")[0]):
            setattr(config, name, 0.0)
    for module in hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout(name) and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
    return changed


def is_random(model: nn.Module) -> bool:
    """Whether a model in training draws random numbers that its settings ask for: dropout, or a router's noise.

    Args:
        model: any module, also one with adapters.
    """
    for module in model.modules():
        if _draws_noise(module) or ("Drop" in type(module).__name__ and _above_0(getattr(module, "p", 0))):
            return True
        if any(_is_dropout(name) and _above_0(value) for name, value in vars(module).items()):
            return True
    return False


_NOISE = "jitter"


def _draws_noise(module: nn.Module) -> bool:
    named = any(_NOISE in name and _above_0(value) for name, value in vars(module).items())
    return named and _as_in_use not in module._forward_pre_hooks.values()


def _as_in_use(module: nn.Module, _inputs: Any) -> None:
    module.train(False)


def _above_0(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0


def _is_dropout(name: str) -> bool:
    return "drop" in name or name.endswith("pdrop")


def architectures() -> list[str]:
    """The `model_type` of every causal architecture that this transformers builds with a sequence-classification head.

    Others are not given a head of btrm's own: no other program could load the model.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    return sorted(set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def require_head_class(config: Any, name: str) -> None:
    """Refuse an architecture that transformers has no sequence-classification model for, before weights are read.

    Args:
        config: the transformers configuration of the base model.
        name: what the user calls the base model.

    Raises:
        CheckpointError: says which architecture it is, and which are near it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return
    if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        return
    known = architectures()
    raise CheckpointError(
        f"cannot load the base model {name}: transformers has no sequence-classification model for its architecture "
        f"({config.model_type}), so no program could load the trained one; expected one of the {len(known)} causal "
        f"architectures that have it, such as {', '.join(_like(config.model_type, known))}."
        f"{did_you_mean(config.model_type, known)}"
    )


def _like(kind: str, known: list[str]) -> list[str]:
    """A few architectures, those that begin like `kind` first."""
    return sorted(known, key=lambda name: (name[:3] != kind[:3], name))[:6]
