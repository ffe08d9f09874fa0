"""Fewer bits through bitsandbytes: frozen base weights in 4, states of the optimizer in 8.

Decides: which 4-bit format (NF4, its scales quantised once more, computed in the run's own type). What neither goes
together with is said in `config`. bitsandbytes is an extra and is imported only where one of the two is asked for.

References: Dettmers et al., QLoRA, arXiv:2305.14314; 8-bit optimizers via block-wise quantization, arXiv:2110.02861.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from btrm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from btrm_core.settings import RunConfig, TrainConfig

INSTALL = "pip install 'btrm[qlora]'"


OPTIMIZERS = {"adamw-8bit": "AdamW8bit", "adamw-8bit-paged": "PagedAdamW8bit"}
"""Setting -> class of `bitsandbytes.optim`."""


LARGEST_PARTITION = 2**31 - 1
"""bitsandbytes counts the elements of a tensor in 32 bits, and ZeRO hands it each group as one flat tensor."""


def require(config: RunConfig) -> None:
    """Refuse a run whose settings need a bitsandbytes, or a device, that is not there.

    Args:
        config: the run's settings, of which `model.quantize` and `train.optimizer` are looked at.

    Raises:
        ConfigError: says what is missing.
    """
    if config.model.quantize != "none":
        library(f"--quantize {config.model.quantize}")
    if config.train.optimizer in OPTIMIZERS:
        library(f"--optimizer {config.train.optimizer}")
    if config.train.optimizer == "adamw-8bit-paged" and not torch.cuda.is_available():
        raise ConfigError(
            "--optimizer adamw-8bit-paged needs a GPU, whose memory it spills from, and torch sees none; "
            "use --optimizer adamw-8bit"
        )


def library(flag: str) -> Any:
    """The bitsandbytes module.

    Args:
        flag: what asks for it, for the error.

    Raises:
        ConfigError: it is not installed, or does not work on this machine.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(f"{flag} needs bitsandbytes, which is not installed; {INSTALL}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in getattr(bitsandbytes, "supported_torch_devices", {"cuda"}):
        raise ConfigError(
            f"{flag} needs a GPU: bitsandbytes {bitsandbytes.__version__} does not run on a {device}; "
            f"use a machine with a GPU, or a newer one: {INSTALL} --upgrade"
        )
    return bitsandbytes


def loading_options(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told for a setting of `model.quantize`; nothing for none.

    Args:
        quantize: "none" or "4bit".
        dtype: the type that unpacked weights are multiplied in.

    Returns:
        Keyword arguments; the head is left whole.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    if quantize == "none":
        return {}
    library(f"--quantize {quantize}")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score"],
    )
    return {"quantization_config": settings}


def settle(hf: Any) -> None:
    """Keep the packed weights of a loaded model as they are, in use and when a checkpoint is read back.

    On some CPUs bitsandbytes would lay them out anew at the first forward pass for evaluation, in a way that cannot be
    unpacked and that takes no layer narrower than 64. And it writes the scales into a state dict, but does not read
    them from one: they are those of the base model, which is loaded and packed at every start.

    Args:
        hf: a model just loaded, changed in place; one without packed weights is left as it is.
    """
    for module in hf.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.register_load_state_dict_pre_hook(_leave_out_scales)


def _leave_out_scales(_: nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}weight.")]:
        del state_dict[name]


def is_quantized(module: nn.Module) -> bool:
    """True for a model with packed weights, or for such a layer.

    Args:
        module: packed weights are known by the `quant_state` that bitsandbytes gives them.
    """
    return any(hasattr(parameter, "quant_state") for parameter in module.parameters())


def whole_weight(weight: Tensor) -> Tensor:
    """The weight as it is multiplied with: (out, in) in the type it was loaded in, whether packed or not.

    Args:
        weight: a weight; one that bitsandbytes packed is unpacked into new memory.

    Returns:
        `weight` itself if it is not packed.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    unpacked: Tensor = library("--quantize 4bit").functional.dequantize_4bit(weight.data, state)
    return unpacked


def optimizer(groups: Sequence[dict[str, Any]], train: TrainConfig, world: int) -> torch.optim.Optimizer:
    """AdamW with its two moments in 8 bits, over parameter groups.

    ZeRO hands it each group of a process as one flat fp32 tensor; blocks of 256 elements have a scale of their own.

    Args:
        groups: parameters with their weight decay, as `parameter_groups` returns them.
        train: names the optimizer (a key of `OPTIMIZERS`), and learning rate, betas and epsilon.
        world: how many processes share each group under ZeRO.

    Returns:
        The optimizer that DeepSpeed is handed, with the settings' learning rate, not yet that of a step.

    Raises:
        ConfigError: bitsandbytes is missing, or one process would hold more elements than it can count.
    """
    flag = f"--optimizer {train.optimizer}"
    kind = getattr(library(flag).optim, OPTIMIZERS[train.optimizer])
    largest = max(math.ceil(sum(p.numel() for p in group["params"]) / world) for group in groups)
    if largest > LARGEST_PARTITION:
        raise ConfigError(
            f"{flag}: one process would update {largest:,} parameters, and bitsandbytes counts to "
            f"{LARGEST_PARTITION:,}; use more GPUs, --lora-rank, or --optimizer adamw"
        )
    made: torch.optim.Optimizer = kind(
        groups, lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_eps
    )
    return made
