"""Whether a workload fits on a GPU, and the longest conversations that do."""

from __future__ import annotations

import dataclasses

from btrm_core.model import Parameters, Shape
from btrm_core.preflight.plan import memory
from btrm_core.preflight.plan.activations import Kept, activations
from btrm_core.preflight.plan.hardware import GIB, Hardware
from btrm_core.preflight.plan.memory import Memory, Zero
from btrm_core.preflight.plan.workload import Workload

# Not in the peak of tensors: CUDA context, cuBLAS workspaces and NCCL buffers (GiB), and the unused parts of the blocks
# that come and go (the states are a few flat tensors and do not fragment). Assumed, not measured.
CONTEXT = 1.5


FRAGMENTATION = 0.10


LONGEST = 2**24
"""Tokens of the longest conversations that are looked for."""


def needed(
    zero: Zero, kept: Kept, parameters: Parameters, shape: Shape, hardware: Hardware, work: Workload
) -> tuple[Memory, bool]:
    """What a workload needs on each GPU, and whether that fits.

    Args:
        zero: the ZeRO settings.
        kept: what the backward pass does not compute again.
        parameters: the model's counts.
        shape: its widths.
        hardware: the GPUs.
        work: what is trained.
    """
    # a packed weight is unpacked for its product, one at a time
    unpacked = (2 if work.bf16 else 4) * shape.hidden * shape.intermediate if parameters.packed else 0
    held = activations(
        shape,
        work.row_tokens,
        kept=kept,
        bf16=work.bf16,
        kv_copies=work.keys_per_token,
        lora_rank=work.lora_rank,
        share=work.sequence_parallel,
    )
    found = memory.memory(parameters, zero, hardware.gpus, held + unpacked)
    margin = FRAGMENTATION * (found.activations + found.buffers) + CONTEXT * GIB
    return found, found.total + margin <= hardware.memory


def longest(zero: Zero, parameters: Parameters, shape: Shape, hardware: Hardware, work: Workload) -> int:
    """The longest conversations of which a pair fits, activations recomputed, in whole blocks of 128 tokens.

    Args:
        zero: the ZeRO settings.
        parameters: the model's counts.
        shape: its widths.
        hardware: the GPUs.
        work: what is trained; its own longest conversation does not matter.

    Returns:
        Tokens; 0 if not even rows of the token budget fit.
    """
    low, high = 0, LONGEST // 128  # blocks that fit, and too many
    while high - low > 1:
        middle = (low + high) // 2
        one = dataclasses.replace(work, max_length=128 * middle)
        _, fits = needed(zero, "inputs", parameters, shape, hardware, one)
        low, high = (middle, high) if fits else (low, middle)
    return 128 * low
