"""What a training step costs, by arithmetic alone: bytes on each GPU, bytes between GPUs, floating-point operations.

Decides: the formulas. Does not decide: where a model's shape comes from, or which preset is recommended (`estimate`).
Every function is pure; counts are integers, bytes are bytes (1 GiB = 2**30), times are seconds.

The state formulas follow DeepSpeed 0.19 under bf16 with fp32 masters, fp32 moments and fp32 accumulation, or under
fp32; each names the function it was read from (paths inside `deepspeed/runtime`). P are the trainable parameters, F the
frozen ones, N the GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btrm_core.model import kv_copies as copies_of_keys

if TYPE_CHECKING:
    from btrm_core.model import Parameters, Shape

FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: each 64 have a scale of 8 bits, and each 256 of those one in fp32 (QLoRA,
arXiv:2305.14314, section 3: 0.127 bits a weight)."""


EIGHT_BIT_MOMENT = 1 + 4 / 256
"""Bytes of an AdamW moment in 8 bits: each 256 have a scale in fp32 (bitsandbytes/optim/optimizer.py:init_state; arXiv:
2110.02861, section 2.1, with blocks of 2048)."""


@dataclass(frozen=True)
class Zero:
    """The settings of `zero_optimization` that memory and traffic depend on, with DeepSpeed's defaults."""

    stage: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    multi_rank_allreduce: bool = True
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    communication_bytes: int = 2
    """Bytes per gradient element on the wire: bf16 unless `communication_data_type` says fp32."""
    immediate_grad_update: bool = False
    """`bf16.immediate_grad_update`: stage 1 frees each bf16 gradient once it is added to the fp32 buffer."""
    bf16: bool = True
    moment_bytes: float = 4
    """Bytes of each of AdamW's two moments per parameter: fp32 unless the optimizer keeps them in 8 bits."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Zero:
        """Read a DeepSpeed configuration (zero/config.py:DeepSpeedZeroConfig has the same defaults).

        Args:
            config: a DeepSpeed configuration.
        """
        zero = config.get("zero_optimization", {})
        bf16 = bool(config.get("bf16", {}).get("enabled", False))
        stage = int(zero.get("stage", 1))

        def number(key: str, default: int) -> int:
            return int(float(zero.get(key, default)))

        def offloaded(key: str) -> bool:
            return str((zero.get(key) or {}).get("device", "none")) != "none"

        wire = str(config.get("communication_data_type") or ("bf16" if bf16 else "fp32"))
        return cls(
            stage=stage,
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
            reduce_bucket_size=number("reduce_bucket_size", cls.reduce_bucket_size),
            multi_rank_allreduce=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            prefetch_bucket_size=number("stage3_prefetch_bucket_size", cls.prefetch_bucket_size),
            max_reuse_distance=number("stage3_max_reuse_distance", cls.max_reuse_distance),
            sub_group_size=number("sub_group_size", cls.sub_group_size),
            communication_bytes=4 if wire in ("fp32", "float32") else 2,
            immediate_grad_update=bool(config.get("bf16", {}).get("immediate_grad_update", False)),
            bf16=bf16,
        )


@dataclass(frozen=True)
class States:
    """Bytes that live as long as the run: on one GPU, and in CPU memory for that GPU's process."""

    weights: int
    gradients: int
    optimizer: int
    host: int


@dataclass(frozen=True)
class Memory:
    """Peak bytes on one GPU (their sum is the peak) and in CPU memory for its process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """What the fullest moment of a step holds besides the other four: buckets, gathered parameters, copies."""
    host: int

    @property
    def total(self) -> int:
        """Peak bytes of tensors on one GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def states(parameters: Parameters, zero: Zero, gpus: int) -> States:
    """Bytes of weights, gradients and optimizer per GPU.

    Stage 1, bf16 (bf16_optimizer.py:_setup_for_real_optimizer): weights 2(P+F); the fp32 gradient buffer is **not**
    partitioned, 4P, and without `immediate_grad_update` the bf16 gradients stay allocated beside it, 2P
    (backward_prologue zeroes them); master and two moments 12P/N. Stage 1 in fp32, or offloaded, runs in
    zero/stage_1_and_2.py with whole gradients.

    Stage 2 (zero/stage_1_and_2.py:_build_compact_grad_partition_buffer): weights 2(P+F), fp32 gradient partition 4P/N,
    on the GPU even when the optimizer is offloaded; host: master, its .grad and moments 16P/N (__init__,
    initialize_optimizer_states), a copy in compute type, and a scratch tensor of the largest parameter.

    Stage 3 (zero/stage3.py:_create_fp32_partitions, _setup_for_real_optimizer): weights 2(P+F)/N plus the small
    tensors that stay gathered (zero/parameter_offload.py:mark_persistent_parameters), gradients 4P/N
    (grad_partitions_flat_buffer) and 12P/N; offloaded, all of it moves to the host with one more fp32 gradient
    (initialize_optimizer_states).

    Weights in 4 bits count `FOUR_BIT_BYTES`; moments in 8 bits leave 4 + 2 `EIGHT_BIT_MOMENT` of the 12 bytes. Both are
    for stages 1 and 2.

    Args:
        parameters: the model's counts.
        zero: the ZeRO settings that memory and traffic depend on.
        gpus: number of GPUs.
    """
    width = 2 if zero.bf16 else 4
    whole = parameters.trainable
    part = math.ceil(whole / gpus)
    master_and_moments = math.ceil((4 + 2 * zero.moment_bytes) * part)
    if zero.stage == 3:
        weights = width * math.ceil(parameters.total / gpus)
        gradients = 4 * part
        persistent = width * parameters.small
        host = weights if zero.offload_param else 0
        if zero.offload_optimizer:
            return States(persistent + weights - host, 0, 0, host + gradients + 4 * part + master_and_moments)
        return States(persistent + weights - host, gradients, master_and_moments, host)
    weights = width * (parameters.total - parameters.packed) + math.ceil(FOUR_BIT_BYTES * parameters.packed)
    if zero.stage == 2:
        gradients = 4 * part if zero.bf16 or not zero.offload_optimizer else 0
    else:
        kept = 2 * whole if zero.bf16 and not zero.offload_optimizer and not zero.immediate_grad_update else 0
        gradients = 4 * whole + kept
    if zero.offload_optimizer:
        accumulated = (
            4 * part if zero.stage == 2 and not zero.bf16 else 0
        )  # stage_1_and_2.py:async_accumulate_grad_in_cpu_via_gpu
        host = master_and_moments + 4 * part + width * part + width * parameters.largest + accumulated
        return States(weights, gradients, 0, host)
    return States(weights, gradients, master_and_moments, 0)


def memory(parameters: Parameters, zero: Zero, gpus: int, activation_bytes: int) -> Memory:
    """Peak bytes per GPU: the states plus the fullest of three moments of a step.

    - Start of the backward pass: all activations, the reduce bucket (stage 2: stage_1_and_2.py:setup_buckets, two with
      overlap_comm, and a flattened copy in allreduce_bucket; stage 3: the one of _setup_for_real_optimizer and its
      reduce-scatter copy), and under stage 3 the gathered parameters: those reused within `stage3_max_reuse_distance`
      after the turn from forward to backward (partitioned_param_coordinator.py:__params_to_release), the prefetched
      ones and one layer.
    - Its end: activations are gone; the gradient of the largest tensor exists in compute type, for stage 2 with a copy,
      for stage 3 with its fp32 partition.
    - The update: stage 1 converts the whole fp32 gradient to the wire type (engine.py:allreduce_bucket); stage 3 copies
      the fp32 gradient of one sub-group (stage3.py:_prepare_fp32_grad_for_sub_group).

    Args:
        parameters: the model's counts.
        zero: the ZeRO settings that memory and traffic depend on.
        gpus: number of GPUs.
        activation_bytes: from `activations`.
    """
    held = states(parameters, zero, gpus)
    width = 2 if zero.bf16 else 4
    whole, part = parameters.trainable, math.ceil(parameters.trainable / gpus)
    largest = width * min(parameters.largest, whole)
    bf16_stage1 = zero.stage == 1 and zero.bf16 and not zero.offload_optimizer
    if bf16_stage1:
        bucket = 0
        end = largest if zero.immediate_grad_update else 0
        update = zero.communication_bytes * whole if zero.communication_bytes < 4 else 0
    elif zero.stage == 3:
        live = max(zero.max_reuse_distance // 2, parameters.largest) + zero.prefetch_bucket_size
        gathered = width * min(parameters.total, live + parameters.per_layer)
        bucket = gathered + width * (zero.reduce_bucket_size + min(whole, zero.reduce_bucket_size))
        end = largest + 4 * math.ceil(min(parameters.largest, whole) / gpus)
        update = 0 if zero.offload_optimizer else 4 * min(part, zero.sub_group_size)
    else:
        copies = 2 if zero.overlap_comm else 1
        bucket = width * (copies * zero.reduce_bucket_size + min(whole, zero.reduce_bucket_size))
        end = largest * (2 if gpus > 1 else 1)
        update = 0 if zero.offload_optimizer or zero.bf16 else 4 * part
    if zero.offload_optimizer and zero.stage < 3:
        bucket += width * parameters.largest  # temp_grad_buffer_for_gpu_offload
    peak = max(bucket + activation_bytes, bucket + end, update)
    return Memory(held.weights, held.gradients, held.optimizer, activation_bytes, peak - activation_bytes, held.host)


def communication(parameters: Parameters, zero: Zero, gpus: int, micro_batches: int) -> int:
    """Bytes that one GPU sends in one optimizer step (it receives as many), with ring collectives.

    A ring all-reduce of B bytes sends 2B(N-1)/N, a reduce-scatter or all-gather half of it. Stage 1 all-reduces the
    gradients once per step (engine.py:allreduce_gradients) and all-gathers the weights. Stage 2 reduces after **every**
    micro-batch, by all-reduce unless `use_multi_rank_bucket_allreduce` is off (stage_1_and_2.py:average_tensor), and
    all-gathers once. Stage 3 all-gathers the weights for the forward and again for the backward pass of every
    micro-batch, frozen ones too, and reduce-scatters the gradients (stage3.py:__avg_scatter_grads).

    Args:
        parameters: the model's counts.
        zero: the ZeRO settings that memory and traffic depend on.
        gpus: number of GPUs.
        micro_batches: micro-batches per step on each GPU.
    """
    ring = (gpus - 1) / gpus
    width = 2 if zero.bf16 else 4
    gradients = zero.communication_bytes * parameters.trainable
    weights = width * parameters.trainable
    if zero.stage == 3:
        return round(ring * micro_batches * (2 * width * parameters.total + gradients))
    if zero.stage == 2:
        factor = 2 if zero.multi_rank_allreduce else 1
        return round(ring * (micro_batches * factor * gradients + weights))
    return round(ring * (2 * gradients + weights))


def exchanged(shape: Shape, tokens: float, share: int, *, passes: int = 2, bf16: bool = True) -> int:
    """Bytes that one GPU sends to those it shares rows with, for so many tokens of its own.

    Queries, keys and values go out and outputs come back, once a pass and layer; a GPU keeps its own part (Ulysses,
    arXiv:2309.14509, section 3.2).

    Args:
        shape: the widths.
        tokens: computed by this GPU.
        share: how many GPUs share a row; 1 sends nothing.
        passes: forward, backward, and a third where activations are recomputed.
        bf16: compute type bf16; False is fp32.
    """
    if share == 1:
        return 0
    kv_heads = shape.kv_heads * copies_of_keys(shape.heads, shape.kv_heads, share)
    numbers = (2 * shape.heads + 2 * kv_heads) * shape.head_dim
    return round((share - 1) / share * len(shape.windows) * passes * tokens * (2 if bf16 else 4) * numbers)
