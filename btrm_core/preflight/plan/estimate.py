"""`btrm plan`: what a run needs and how long it takes, from a transformers configuration alone.

Decides: which preset is recommended, and what is said. The formulas are in `memory`, what counts as fitting in
`fitting`, the model's counts come from `model.shape`, the GPUs from `hardware`.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btrm_core.config import apply, check
from btrm_core.console import table
from btrm_core.errors import ConfigError
from btrm_core.model import Parameters, Shape, check_heads, divisors, flops_per_token, positions_problem, read_shape
from btrm_core.preflight.plan import memory
from btrm_core.preflight.plan.activations import HOW, SPEED, Kept
from btrm_core.preflight.plan.fitting import CONTEXT, FRAGMENTATION, longest, needed
from btrm_core.preflight.plan.hardware import GIB, Hardware, read_hardware
from btrm_core.preflight.plan.memory import Memory, Zero
from btrm_core.preflight.plan.workload import Workload
from btrm_core.settings import ModelConfig, RunConfig

PRESETS = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
"""In the order in which they are preferred: least traffic first, the CPU's memory last."""


RECOMPUTED: dict[Kept, str] = {"all": "no", "products": "cheap part", "inputs": "yes"}


@dataclass(frozen=True)
class Reach:
    """The longest conversations that fit, in tokens, where so many GPUs share each row, and the preset for it."""

    sequence_parallel: int
    preset: str
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """One DeepSpeed preset for one model, workload and set of GPUs."""

    preset: str
    kept: Kept
    """What the backward pass does not compute again."""
    memory: Memory
    fits: bool
    communication: int
    """Bytes each GPU sends per optimizer step."""
    pairs_per_second: float | None
    hours: float | None
    """Hours for all pairs and epochs; None without `pairs` or a known peak."""
    command: str
    recommended: bool
    parameters: Parameters
    shape: Shape
    hardware: Hardware
    workload: Workload


def estimate(
    config: Any,
    work: Workload | None = None,
    hardware: Hardware | None = None,
    deepspeed: str | None = None,
    kept: Kept | None = None,
) -> list[Estimate]:
    """Estimate every preset (or one preset or DeepSpeed file); at most one estimate is the recommended one.

    Args:
        config: a transformers configuration, or the directory or hub id of a model that has one.
        work: what is trained; None is what a run without further settings does.
        hardware: the GPUs; None assumes one H100.
        deepspeed: one preset or a DeepSpeed JSON file; None estimates all presets.
        kept: what the backward pass does not compute again; None keeps as much as fits.

    Returns:
        One estimate per preset, in the order in which they are preferred.

    Raises:
        BtrmError: the configuration cannot be read, its architecture is unknown, or settings contradict each other.
    """
    from btrm_core.training.processes import check_shares

    workload = work or Workload()
    check(_settings("zero1", workload))
    if isinstance(config, str):
        from btrm_core.model import base_config

        name, config = config, base_config(ModelConfig(name=config))
        workload = dataclasses.replace(workload, model=name)
    hardware = hardware or read_hardware()
    if (problem := positions_problem(config, workload.max_length)) is not None and problem[0]:
        raise ConfigError(problem[1])
    check_shares(_settings("zero1", workload), hardware.gpus)
    check_heads(config, workload.sequence_parallel)
    parameters, shape = read_shape(config, workload.lora_rank, workload.quantize != "none")
    found = [
        _estimate(preset, kept, parameters, shape, hardware, workload)
        for preset in ([deepspeed] if deepspeed else [p for p in PRESETS if _possible(p, workload)])
    ]
    fitting = [e for e in found if e.fits]
    best = min(fitting, key=_preference, default=None)
    return [dataclasses.replace(e, recommended=e is best) for e in found]


def _possible(preset: str, work: Workload) -> bool:
    """Whether a preset goes with 4-bit weights and 8-bit optimizers."""
    try:
        read_zero(preset, work, 1)
    except ConfigError:
        return False
    return True


def _preference(e: Estimate) -> tuple[bool, int, int]:
    """Smaller is better: no CPU offload, then little recomputation (a third more operations), then little traffic.

    With offload the traffic to the CPU decides, so recomputing is better than fetching the weights from there.
    """
    offloaded = e.memory.host > 0
    return offloaded, 0 if offloaded else [*HOW].index(e.kept), PRESETS.index(e.preset) if e.preset in PRESETS else 0


def _estimate(
    preset: str, wanted: Kept | None, parameters: Parameters, shape: Shape, hardware: Hardware, work: Workload
) -> Estimate:
    gpus = hardware.gpus
    zero = read_zero(preset, work, gpus)
    for kept in HOW if wanted is None else (wanted,):
        peak, fits = needed(zero, kept, parameters, shape, hardware, work)
        if fits:
            break
    speed = None
    if hardware.tflops and work.bf16:
        flops = work.pair_tokens * flops_per_token(parameters, shape, work.pair_tokens)
        speed = gpus * hardware.tflops * 1e12 * work.mfu / flops * SPEED[kept]
    return Estimate(
        preset=preset,
        kept=kept,
        memory=peak,
        fits=fits,
        communication=memory.communication(parameters, zero, gpus, work.micro_batches(gpus))
        + memory.exchanged(
            shape,
            work.pairs_per_step * work.pair_tokens / gpus,
            work.sequence_parallel,
            passes=2 if kept == "all" else 3,
            bf16=work.bf16,
        ),
        pairs_per_second=speed,
        hours=work.pairs * work.epochs / speed / 3600 if speed and work.pairs else None,
        command=_command(preset, kept, gpus, work),
        recommended=False,
        parameters=parameters,
        shape=shape,
        hardware=hardware,
        workload=work,
    )


def read_zero(preset: str, work: Workload, world: int) -> Zero:
    """The ZeRO settings that btrm hands to DeepSpeed.

    Args:
        preset: a preset's name, or a DeepSpeed JSON file.
        work: what is trained.
        world: number of processes.

    Returns:
        The settings that memory and traffic depend on.

    Raises:
        ConfigError: the preset is unknown, or 4-bit weights or an 8-bit optimizer do not go with it.
    """
    from btrm_core.training.processes import deepspeed_config

    zero = Zero.from_config(deepspeed_config(_settings(preset, work), world))
    return zero if work.optimizer == "adamw" else dataclasses.replace(zero, moment_bytes=memory.EIGHT_BIT_MOMENT)


def _settings(preset: str, work: Workload) -> RunConfig:
    values = {
        "distributed.deepspeed": preset,
        "model.dtype": "bf16" if work.bf16 else "fp32",
        "model.quantize": work.quantize,
        "lora.rank": work.lora_rank,
        "train.optimizer": work.optimizer,
        "distributed.sequence_parallel": work.sequence_parallel,
    }
    return apply(RunConfig(), values)


def _command(preset: str, kept: Kept, gpus: int, work: Workload) -> str:
    words = ["btrm", "train", "--model", work.model, "--data", "DATA"]
    words += ["--gpus", str(gpus)] if gpus > 1 else []
    words += ["--sequence-parallel", str(work.sequence_parallel)] if work.sequence_parallel > 1 else []
    words += ["--deepspeed", preset, "--max-length", str(work.max_length)]
    words += ["--tokens-per-batch", str(work.tokens_per_batch), "--pairs-per-step", str(work.pairs_per_step)]
    words += ["--lora-rank", str(work.lora_rank)] if work.lora_rank else []
    words += ["--quantize", work.quantize] if work.quantize != "none" else []
    words += ["--optimizer", work.optimizer] if work.optimizer != "adamw" else []
    words.append(HOW[kept])
    words += [] if work.epochs == 1 else ["--epochs", f"{work.epochs:g}"]
    return shlex.join(words)


def format_estimate(estimates: Sequence[Estimate]) -> str:
    """The table that `btrm plan` prints, with the recommended command and what to expect from it.

    Args:
        estimates: from `estimate`, at least one.
    """
    first = estimates[0]
    work, gpus = first.workload, first.hardware.gpus
    lines = [_header(first), ""]
    columns: tuple[str, ...] = ("GiB per GPU", "weights", "gradients", "optimizer", "activations", "buffers", "total")
    columns += ("fits", "recompute", "CPU GiB (all)", "sent GiB/step")
    rows = [columns]
    for e in estimates:
        m = e.memory
        sizes = (m.weights, m.gradients, m.optimizer, m.activations, m.buffers, m.total)
        row: tuple[str, ...] = (e.preset, *(f"{size / GIB:.1f}" for size in sizes), "yes" if e.fits else "no")
        row += (RECOMPUTED[e.kept], f"{m.host * gpus / GIB:.1f}", f"{e.communication / GIB:.1f}")
        rows.append(row)
    lines += table(rows, right=range(1, len(columns)))
    lines += [
        f"fits: total, {FRAGMENTATION:.0%} of activations and buffers, and {CONTEXT} GiB for CUDA and NCCL (assumed) "
        f"are at most {first.hardware.memory / GIB:.1f} GiB",
        "",
    ]
    best = next((e for e in estimates if e.recommended), None)
    reached = reach(estimates)
    if best is None:
        return "\n".join([*lines, *_reach_text(reached, gpus), _advice(first, reached)])
    lines += [f"Recommended: {best.preset}", f"  {best.command}"]
    if best.pairs_per_second:
        hours = f", {best.hours:.1f} hours for {work.pairs:,} pairs x {work.epochs:g}" if best.hours else ""
        slower = "; the optimizer on the CPU makes it slower" if best.memory.host else ""
        lines.append(f"Expected: {best.pairs_per_second:.1f} pairs/s{hours} at {work.mfu_source}{slower}")
    else:
        lines.append("Expected: unknown without the GPU's speed in bf16; name one with --gpu")
    return "\n".join([*lines, *_reach_text(reached, gpus)])


def reach(estimates: Sequence[Estimate]) -> list[Reach]:
    """How long conversations may be on the same GPUs, for every number of them that can share a row.

    Activations are computed again. States stay on the GPUs if there is a preset for that which fits.

    Args:
        estimates: from `estimate`, at least one.

    Returns:
        One for each number, 1 first; without those that fit no row at all.
    """
    first = estimates[0]
    gpus = first.hardware.gpus
    zeros = {e.preset: read_zero(e.preset, first.workload, gpus) for e in estimates}
    offloaded = {e.preset for e in estimates if e.memory.host}
    found = []
    for share in (n for n in divisors(gpus) if first.shape.heads % n == 0):
        work = dataclasses.replace(first.workload, sequence_parallel=share)
        tokens = {p: longest(zero, first.parameters, first.shape, first.hardware, work) for p, zero in zeros.items()}
        best = max(tokens, key=lambda preset: (preset not in offloaded and tokens[preset] > 0, tokens[preset]))
        found.append(Reach(share, best, tokens[best]))
    return [one for one in found if one.tokens]


def _reach_text(reached: Sequence[Reach], gpus: int) -> list[str]:
    """From which length on rows have to be shared, and how far that reaches."""
    alone = next((one for one in reached if one.sequence_parallel == 1), None)
    shared = [one for one in reached if one.sequence_parallel > 1]
    lines = []
    if alone is not None:
        lines.append(
            f"Conversations of up to {alone.tokens:,} tokens fit without sharing rows ({alone.preset}, recomputing "
            f"activations); longer ones need --sequence-parallel{'' if gpus > 1 else ' and more GPUs'}"
        )
    if shared:
        parts = [f"N = {one.sequence_parallel}: {one.tokens:,} tokens ({one.preset})" for one in shared]
        lines.append(f"with --sequence-parallel N: {', '.join(parts)}")
    return lines


def _header(e: Estimate) -> str:
    p, w, h = e.parameters, e.workload, e.hardware
    peak = f", {h.tflops:g} TFLOP/s" if h.tflops else ""
    lora = f"; LoRA rank {w.lora_rank} trains {p.trainable:,}" if w.lora_rank else ""
    lora += f", {p.packed:,} are kept in 4 bits" if p.packed else ""
    shares = f", each over {w.sequence_parallel} GPUs" if w.sequence_parallel > 1 else ""
    shared = "" if w.shared is None else f" ({w.shared:.1%} of separate passes' are computed once)"
    return (
        f"{w.model}: {p.total:,} parameters = embedding {p.embedding:,} + {len(e.shape.windows)} layers {p.layers:,} "
        f"+ norms {p.norm:,} + head {p.head:,}{lora}\n"
        f"{h.gpus} x {h.name} ({h.memory / GIB:.1f} GiB{peak}); rows of up to {w.row_tokens:,} tokens{shares}; "
        f"{w.pairs_per_step} pairs per step of about {w.pair_tokens:,.0f} tokens{shared}: "
        f"{w.micro_batches(h.gpus)} micro-batches per GPU"
    )


def _advice(e: Estimate, reached: Sequence[Reach]) -> str:
    """What would fit when nothing does: shared rows, shorter ones, more GPUs, adapters."""
    wide = [one for one in reached if one.sequence_parallel > 1 and one.tokens >= e.workload.max_length]
    ideas = [f"--sequence-parallel {wide[0].sequence_parallel} --deepspeed {wide[0].preset}"] if wide else []
    if e.workload.tokens_per_batch > 2 * e.workload.max_length:
        ideas.append(f"--tokens-per-batch {2 * e.workload.max_length}")
    for gpus in (2**i for i in range(1, 11)) if _possible("zero3", e.workload) else ():
        hardware = dataclasses.replace(e.hardware, gpus=gpus)
        if gpus > e.hardware.gpus and _estimate("zero3", "inputs", e.parameters, e.shape, hardware, e.workload).fits:
            ideas.append(f"--deepspeed zero3 --gradient-checkpointing on {gpus} such GPUs")
            break
    ideas += [] if e.workload.lora_rank else ["--lora-rank 16"]
    ideas.append("--max-length " + str(e.workload.max_length // 2))
    return "Nothing fits. Try btrm plan with: " + "; or ".join(ideas)


def to_dict(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The estimates as plain values for `--json`; bytes, not GiB.

    Args:
        estimates: from `estimate`, at least one.
    """
    first = estimates[0]
    shared = ("parameters", "shape", "hardware", "workload")
    out: dict[str, Any] = {name: dataclasses.asdict(getattr(first, name)) for name in shared}
    out["parameters"].update(total=first.parameters.total, trainable=first.parameters.trainable)
    out["workload"]["tokens_per_pair"] = first.workload.pair_tokens
    out["longest"] = [dataclasses.asdict(one) for one in reach(estimates)]
    out["presets"] = []
    for e in estimates:
        own = {k: v for k, v in dataclasses.asdict(e).items() if k not in shared}
        own["memory"]["total"] = e.memory.total
        out["presets"].append(own)
    return out
