"""What a result file holds: how runs are summarised, written, read back and checked.

A file of `benchmarks/results/` is self-contained: configuration, workload, hardware, versions, commit, raw seconds of
every step, and the figures derived from them. The table of the README is made from these files alone.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.harness import ArmRun
from benchmarks.workload import Settings, Workload
from btrm_core.model import peak_flops

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
BASELINE, CEILING = "trl", "backbone"

# What must be in a file of each benchmark, key -> type; extra keys are allowed.
COMMON: dict[str, Any] = {
    "schema": int,
    "benchmark": str,
    "name": str,
    "created": str,
    "commit": (str, type(None)),
    "dirty": bool,
    "command": str,
    "hardware": dict,
    "versions": dict,
    "config": dict,
    "arms": dict,
    "comparisons": dict,
    "notes": list,
}
ARM: dict[str, dict[str, Any]] = {
    "train_throughput": {
        "pairs_per_second": dict,
        "pairs_per_cpu_second": dict,
        "tokens_computed": int,
        "padding_percent": float,
        "waste_percent": float,
        "tokens_computed_per_second": float,
        "tokens_useful_per_second": float,
        "base_memory": int,
        "peak_memory": int,
        "loss_first_step": (float, type(None)),
        "wall": list,
        "cpu": list,
    },
    "score_throughput": {
        "seconds": dict,
        "cpu_seconds": dict,
        "conversations_per_second": dict,
        "tokens_computed": int,
        "computed_per_trie_token": float,
    },
    "serve_load": {"rows_per_second": dict, "cpu_seconds": dict},
    "score_best_of_n": {"seconds": dict, "cpu_seconds": dict, "tokens_computed": int},
    "quality_vs_trl": {
        "accuracy": float,
        "wilson": list,
        "bootstrap": list,
        "loss": float,
        "longer_wins": float,
        "wall": dict,
        "cpu": dict,
        "training": dict,
        "runs": list,
    },
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes.

    >>> spread([1.0, 4.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 4.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def header(benchmark: str, name: str, settings: Settings | dict[str, Any], commit: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that says what was run, on what, at which commit."""
    config = settings if isinstance(settings, dict) else asdict(settings)
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "name": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **commit,
        "command": environment.command_line(),
        "hardware": environment.hardware(config["device"]),
        "versions": environment.versions(),
        "config": {
            **config,
            "model": environment.named(config["model"]),
            "data": [environment.named(source) for source in config.get("data", ())],
        },
        "notes": [],
    }


def summarise(work: Workload, runs: dict[str, ArmRun], peak: float | None = None) -> dict[str, Any]:
    """Figures of every arm and the comparisons between them; `peak` is the device's dense bf16 FLOP/s."""
    arms = {name: _arm(work, name, run, peak) for name, run in runs.items()}
    return {"workload": work.facts, "arms": arms, "comparisons": _comparisons(arms)}


def _arm(work: Workload, name: str, run: ArmRun, peak: float | None) -> dict[str, Any]:
    wall, cpu, tokens = ([sum(s[key] for s in steps) for steps in run.passes] for key in ("wall", "cpu", "tokens"))
    pairs, counts = work.settings.steps * work.settings.pairs_per_step, work.facts["measured"]
    computed = statistics.mean(tokens)
    known = [sum(s["padding"] for s in steps) for steps in run.passes if all("padding" in s for s in steps)]
    padding = statistics.mean(known) if known else computed - counts["conversations"]
    seconds = statistics.median(wall)
    optimizer = [sum(s.get("optimizer", 0.0) for s in steps) for steps in run.passes]
    out: dict[str, Any] = {
        "pairs_per_second": spread([pairs / w for w in wall]),
        "pairs_per_cpu_second": spread([pairs / c for c in cpu]),
        "tokens_computed": round(computed),
        "padding_percent": 100.0 * padding / computed,
        "waste_percent": 100.0 * (1.0 - counts["trie"] / computed),
        "computed_per_trie_token": computed / counts["trie"],
        "tokens_computed_per_second": computed / seconds,
        "tokens_useful_per_second": counts["trie"] / seconds,
        "base_memory": run.base_memory,
        "peak_memory": run.peak_memory,
        "loss_first_step": run.losses.get("1"),
        "wall": wall,
        "cpu": cpu,
        "optimizer": optimizer if any(optimizer) else None,
        "steps": run.passes,
        "load_average": spread(run.load),
    }
    if run.graphs:
        out["graphs"] = {"at_first": run.graphs[0], "at_last": run.graphs[-1]}
    out["minimal_flops_per_second"] = work.facts["flops_minimal"] / seconds
    if peak:
        recompute = 4 / 3 if work.settings.gradient_checkpointing else 1.0
        hardware = 6.0 * work.facts["parameters"]["backbone_without_embeddings"] * computed * recompute
        out["mfu_minimal_percent"] = 100.0 * work.facts["flops_minimal"] / seconds / peak
        out["mfu_hardware_percent"] = 100.0 * hardware / seconds / peak  # attention entries left out
    return out


def _comparisons(arms: dict[str, Any]) -> dict[str, Any]:
    """Speed against TRL, overhead over the bare backbone, and how far the first losses are apart; pass by pass."""
    out: dict[str, Any] = {"speedup": {}, "overhead": {}, "loss_difference": {}}
    for name, arm in arms.items():
        if BASELINE in arms and name != BASELINE and not name.startswith(CEILING):
            base = arms[BASELINE]
            out["speedup"][name] = {
                key: spread([b / a for b, a in zip(base[key], arm[key], strict=True)]) for key in ("wall", "cpu")
            }
            if arm["loss_first_step"] is not None and base["loss_first_step"] is not None:
                out["loss_difference"][name] = abs(arm["loss_first_step"] - base["loss_first_step"])
    ours = arms.get("btrm-shared")
    for name in (CEILING, "backbone-causal"):
        if ours and name in arms:
            bare = arms[name]
            out["overhead"][name] = {
                key: spread([100.0 * (a / b - 1.0) for a, b in zip(ours[key], bare[key], strict=True)])
                for key in ("wall", "cpu")
            }
            if ours["optimizer"]:
                without = [a - o for a, o in zip(ours["wall"], ours["optimizer"], strict=True)]
                out["overhead"][name]["wall_without_optimizer"] = spread(
                    [100.0 * (a / b - 1.0) for a, b in zip(without, bare["wall"], strict=True)]
                )
    return out


def write(result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Check and write a result as `<name>.json`; returns its path."""
    check(result)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def load_all(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """Every throughput and scoring result of a directory by name, checked; other benchmarks' files are left alone."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    ours = [result for result in found if result.get("benchmark") in ARM]
    for result in ours:
        check(result)
    return ours


def check(result: dict[str, Any]) -> None:
    """Raise ValueError, naming the key, if a result does not have the form that is promised."""
    _has(result, COMMON, result.get("name", "result"))
    if result["schema"] != SCHEMA or result["benchmark"] not in ARM:
        raise ValueError(f"{result['name']}: unknown schema {result['schema']} or benchmark {result['benchmark']}")
    for name, arm in result["arms"].items():
        _has(arm, ARM[result["benchmark"]], f"{result['name']}: arm {name}")


def _has(record: dict[str, Any], keys: dict[str, Any], where: str) -> None:
    for key, kind in keys.items():
        if key not in record:
            raise ValueError(f"{where}: '{key}' is missing")
        if not isinstance(record[key], kind):
            raise ValueError(f"{where}: '{key}' is {type(record[key]).__name__}")


def device_peak(hardware: dict[str, Any], given_tflops: float | None) -> float | None:
    """The peak to count utilisation against: the one given, else the GPU's from the table; None on CPU."""
    if given_tflops:
        return given_tflops * 1e12
    return peak_flops(hardware["gpu"]) if "gpu" in hardware else None
