"""Which GPUs are known, how much memory and speed they have, and what utilisation is assumed of them."""

from __future__ import annotations

from dataclasses import dataclass

from btrm_core.errors import ConfigError, did_you_mean
from btrm_core.model import GPUS

GIB = 2**30


# Of a GPU sold with G GB, PyTorch sees about 0.985 G GiB (79.1 of 80, 139.7 of 141, 47.4 of 48, 23.6 of 24).
VISIBLE = 0.985


ASSUMED_MFU = 0.40


ASSUMED_MFU_SOURCE = "assumed 40 % MFU without recomputation (an H100 reached 33 % with it, where 30 % is assumed)"


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

    Args:
        gpus: number of GPUs.
        gpu: a name such as h100; None is that one.
        gpu_memory: memory of one GPU in GB, as it is sold.

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
