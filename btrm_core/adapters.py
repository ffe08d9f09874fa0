"""Low-rank adapters (peft): which layers get them, and what is saved of them.

Decides: that the head is always trained and saved whole. A checkpoint is merged into ordinary weights unless the run
asks for the adapters alone.

Reference: Hu et al., LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch

from btrm_core.errors import ConfigError
from btrm_core.settings import LoraConfig

INSTALL = "pip install 'btrm[lora]'"


def add_adapters(hf: Any, lora: LoraConfig, seed: int) -> Any:
    """Wrap a sequence-classification model: backbone frozen, adapters and head trained.

    Adapters start equal on every process for equal seeds; they change no reward before the first step (B is zero).

    Raises:
        ConfigError: peft is not installed, or no layer has one of the target names.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import TaskType, get_peft_model
    except ImportError as error:
        raise ConfigError(f"--lora-rank needs peft, which is not installed; {INSTALL}") from error
    rank = int(lora.rank or 0)
    targets: Any = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
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
        try:
            return get_peft_model(hf, settings)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"lora.targets = {', '.join(lora.targets)}: {first}") from error


def merged_weights(hf: Any, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ordinary weights from those of a wrapped model: W + scale * B A in fp32, rounded once to the weights' type.

    Works on gathered tensors, so it is the same under every ZeRO stage. The head is the trained copy.
    """
    out: dict[str, torch.Tensor] = {}
    scales = _scales(hf)
    for name, tensor in state_dict.items():
        plain = name.removeprefix("base_model.model.")
        if ".lora_" in plain or ".original_module." in plain:
            continue
        if plain.endswith(".base_layer.weight"):
            module = plain.removesuffix(".base_layer.weight")
            prefix = name.removesuffix("base_layer.weight")
            down, up = (state_dict[f"{prefix}lora_{part}.default.weight"].float() for part in "AB")
            delta = scales[module] * (up @ down)
            out[f"{module}.weight"] = (tensor.float() + delta.to(tensor.device)).to(tensor.dtype)
        else:
            out[plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    return out


def _scales(hf: Any) -> dict[str, float]:
    """Scale of the adapter of every adapted layer, by the layer's name in the plain model."""
    return {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in hf.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "lora_A")
    }
