"""Which GPUs are known, how much memory and speed they have, and what utilisation was measured on them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.model import GPUS

GIB = 2**30


# Of a GPU sold with G GB, PyTorch sees about 0.985 G GiB (79.1 of 80, 139.7 of 141, 47.4 of 48, 23.6 of 24).
VISIBLE = 0.985


ASSUMED_MFU = 0.40


ASSUMED_MFU_SOURCE = "assumed 40 % MFU, not measured (Llama 3 reports 38 to 43 %, arXiv:2407.21783, table 4)"


RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a run."""

    name: str
    gpus: int
    memory: int
    """Bytes per GPU that PyTorch can use."""
    tflops: float | None
    """Dense bf16 peak; None when only the memory is known."""


def read_hardware(gpus: int = 1, gpu: str | None = None, gpu_memory: float | None = None) -> Hardware:
    """Resolve `--gpus`, `--gpu NAME` and `--gpu-memory GB` (as sold); the memory given beats the table's.

    Raises:
        ConfigError: an unknown GPU name, or a number that is not positive.
    """
    if gpus < 1 or (gpu_memory is not None and gpu_memory <= 0):
        raise ConfigError(f"--gpus {gpus} --gpu-memory {gpu_memory}: expected numbers above 0")
    name = gpu.lower().removeprefix("nvidia").strip(" -") if gpu else None
    if name is not None and name not in GPUS:
        raise ConfigError(
            f"--gpu {gpu!r}: expected one of {', '.join(GPUS)}, or --gpu-memory GB.{did_you_mean(name, GPUS)}"
        )
    if gpu_memory is not None:
        label = name or f"{gpu_memory:g} GB GPU"
        return Hardware(label, gpus, round(gpu_memory * VISIBLE * GIB), GPUS[name][0] if name else None)
    tflops, visible = GPUS[name or "h100"]
    return Hardware(name or "h100", gpus, round(visible * GIB), tflops)


def read_mfu(gpu: str, directory: Path = RESULTS) -> tuple[float, str]:
    """The MFU measured on this GPU according to the newest results file that has one, else the assumed one."""
    files = sorted(directory.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            found = list(_find_mfu(json.loads(text)))
        except (OSError, ValueError):
            continue
        if found and gpu.split("-")[0].lower() in text.lower():
            shared = [value for name, value in found if "shared" in name]
            value = statistics.median(shared or [value for _, value in found])
            return value, f"{value:.0%} MFU, measured ({file.name})"
    return ASSUMED_MFU, ASSUMED_MFU_SOURCE


def _find_mfu(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every utilisation in a results file with the name of what it belongs to; minimal operations, as a fraction."""
    if isinstance(value, list):
        for item in value:
            yield from _find_mfu(item, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("mfu", "mfu_minimal_percent") and isinstance(item, int | float):
                fraction = item / 100 if key.endswith("percent") else item
                if 0 < fraction <= 1:
                    yield name, float(fraction)
            else:
                yield from _find_mfu(item, key)
