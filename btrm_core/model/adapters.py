"""Low-rank adapters (peft): which layers get them, and what is saved of them.

Decides: that the head is always trained and saved whole. A checkpoint is merged into ordinary weights unless the run
asks for the adapters alone; then its directory names the base model. Merging rounds W + scale * B A to the weights'
type, so a merged model's own rewards are measured before it is saved (`as_merged`). Under 4-bit weights W is what the
packed values stand for: the merged checkpoint is the model that was trained, not the base model that was quantised.

Reference: Hu et al., LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btrm_core.errors import CheckpointError, ConfigError, did_you_mean
from btrm_core.model.quantized import is_quantized, whole_weight
from btrm_core.settings import LoraConfig

INSTALL = "pip install 'btrm[lora]'"


SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""


def no_base_model(name: str) -> CheckpointError:
    """The error that says that a directory of adapters cannot be trained on as it is.

    Args:
        name: The directory or hub id.
    """
    return CheckpointError(
        f"{name} holds adapters, which are no base model; expected whole weights: merge them (those of btrm with "
        f"`btrm export --merge-adapter`), or name the base model of {SETTINGS}; beside merged weights remove that file"
    )


def add_adapters(hf: Any, lora: LoraConfig, seed: int) -> Any:
    """Wrap a sequence-classification model: backbone frozen, adapters and head trained.

    Adapters start equal on every process for equal seeds; they change no reward before the first step (B is zero).

    Args:
        hf: A transformers sequence-classification model with its head `score`; its layers are replaced in place.
        lora: Rank, alpha (None is twice the rank), dropout, and the layers by the ends of their names.
        seed: Of the adapters' random half (A); the caller's random state is left as it was.

    Returns:
        The peft model around `hf`, its adapters in the type of the base weights.

    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of the backbone.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import TaskType, get_peft_model
    except ImportError as error:
        raise ConfigError(f"--lora-rank needs peft, which is not installed; {INSTALL}") from error
    rank = int(lora.rank or 0)
    targets: Any = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    _check_targets(hf, lora.targets)
    settings = PeftConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=lora.alpha if lora.alpha is not None else 2 * rank,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=["score"],
        exclude_modules=["score"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # in the base model's type, which ZeRO-3 needs; their masters are fp32 in any case
        return get_peft_model(hf, settings, autocast_adapter_dtype=False)


def _check_targets(hf: Any, targets: tuple[str, ...]) -> None:
    """Refuse a target that names no layer, which peft would pass over if another one does, or no linear one."""
    if targets == ("all-linear",):
        return
    for target in targets or ("",):  # an empty list in a file of settings
        found = [module for name, module in hf.named_modules() if name and f".{name}".endswith(f".{target}")]
        wrong = [type(module).__name__ for module in found if not isinstance(module, nn.Linear)]
        if wrong or not found or target == "score":
            linear = (name.rpartition(".")[2] for name, module in hf.named_modules() if isinstance(module, nn.Linear))
            names = sorted({*linear} - {"score"})
            what = f"is a {wrong[0]}" if wrong else "is the head, always trained" if found else "is no layer"
            raise ConfigError(
                f"lora.targets: '{target}' {what}; expected all-linear or some of {', '.join(names)}."
                f"{did_you_mean(target, names)}"
            )


def merged_weights(hf: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ordinary weights from those of a wrapped model: W + scale * B A in fp32, rounded once to the weights' type.

    Works on gathered tensors, so it is the same under every ZeRO stage. The head is the trained copy. Packed weights
    are unpacked one at a time.

    Args:
        hf: The wrapped model: its scalings and packed weights are read, the other weights are not.
        state_dict: Whole weights by the wrapped model's names, without the `hf.` of `RewardModel`.

    Returns:
        Weights by the names of the model without adapters; none of it is the adapters' or the untrained head's.
    """
    out: dict[str, Tensor] = {}
    adapted = dict(_adapted(hf))
    packed = {name: weight for name, weight in hf.named_parameters() if hasattr(weight, "quant_state")}
    for name, tensor in state_dict.items():
        plain = name.removeprefix(PREFIX)
        scale_of_packed = name.rpartition(".weight.")[0] + ".weight" in packed
        if ".lora_" in plain or ".original_module." in plain or scale_of_packed:
            continue
        weight = whole_weight(packed[name]) if name in packed else tensor
        if plain.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (state_dict[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            weight = _merged(weight, down, up, adapted[layer].scaling["default"])
        out[plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = weight.to(tensor.device)
    return out


@contextlib.contextmanager
def as_merged(hf: Any) -> Iterator[None]:
    """While active, the wrapped model gives the rewards that its merged checkpoint will give, rounding included.

    Each layer makes its merged weight when it is called, so no second model is held. For evaluation only.

    Args:
        hf: The wrapped model, whose layers give other results until the block ends.
    """
    changed: list[nn.Module] = []
    for _, layer in _adapted(hf):
        for module, forward in (
            (layer, _merged_forward),
            (layer.base_layer, _linear_and_more),
            (layer.lora_A["default"], _own_weight),
            (layer.lora_B["default"], _own_weight),
        ):
            module.forward = partial(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def save_adapters(hf: Any, directory: Path, state_dict: Mapping[str, Tensor], whole_embedding: bool) -> None:
    """Write adapters and head as peft does, with the base model's name, and the configuration of the reward model.

    Args:
        hf: The wrapped model.
        directory: Where to write.
        state_dict: Its whole weights by its own names.
        whole_embedding: Save the embeddings too, because a new token has a row that the base model lacks.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = plain_model(hf).config
    settings = copy.deepcopy(hf.peft_config["default"])
    base = Path(str(settings.base_model_name_or_path))
    if base.is_dir():
        settings.base_model_name_or_path = str(base.resolve())
    else:
        settings.revision = getattr(hf.get_base_model().config, "_commit_hash", None)
    settings.inference_mode = True
    weights = get_peft_model_state_dict(hf, state_dict=dict(state_dict), save_embedding_layers=whole_embedding)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS, {"format": "pt"})
    settings.save_pretrained(directory)
    config.save_pretrained(directory)


def plain_model(hf: Any) -> Any:
    """The transformers model whose class and configuration merged weights are saved with: never a quantised one.

    Args:
        hf: The wrapped model.

    Returns:
        The model inside `hf`; where that is packed, an empty one of its class, on the meta device and without the
        quantisation settings.
    """
    base = hf.get_base_model()
    if not is_quantized(base):
        return base
    config = copy.deepcopy(base.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(base)(config)


def _adapted(hf: Any) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, by their names in the wrapped model."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in hf.named_modules() if isinstance(module, LoraLayer))


def _merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    delta = float(scale) * (up.float() @ down.float())
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)


def _merged_forward(layer: Any, hidden: Tensor) -> Tensor:
    """What a layer with adapters gives; each weight is read in its own module's call, where ZeRO-3 has gathered it."""
    down, up = layer.lora_A["default"](hidden), layer.lora_B["default"](hidden)
    merged: Tensor = layer.base_layer(hidden, down, up, layer.scaling["default"])
    return merged


def _own_weight(linear: nn.Linear, _: Tensor) -> Tensor:
    return linear.weight.clone()


def _linear_and_more(linear: nn.Linear, hidden: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    weight = _merged(whole_weight(linear.weight), down, up, scale)
    return F.linear(hidden, weight.to(hidden.dtype), linear.bias)
