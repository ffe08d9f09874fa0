"""Model FLOPs utilisation: what share of the GPUs' arithmetic a run uses for what must be computed."""

from __future__ import annotations

from typing import Any

from btrm_core.architecture import read_shape
from btrm_core.errors import BtrmError
from btrm_core.hardware import GPUS
from btrm_core.memory import flops_per_token


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
    words = device_name.lower().replace("-", " ").split()
    name = next((gpu for gpu in sorted(GPUS, key=len, reverse=True) if gpu in words), None)
    if name is None:
        return None
    try:
        parameters, shape = read_shape(config, lora_rank)
    except BtrmError:
        return None
    peak = GPUS[name][0] * 1e12 * world
    return 100.0 * flops_per_token(parameters, shape, tokens_per_conversation) / peak
