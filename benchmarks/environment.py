"""What a result must say about where it was measured: hardware, versions, commit, threads, load.

Decides: which thread settings every arm runs under, and when a result may be written at all (a clean git tree).
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "btrm",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "trl",
    "flash-attn",
    "liger-kernel",
    "numpy",
)

# Outputs of benchmarks: writing one result must not forbid writing the next.
OUTPUTS = ("benchmarks/results/", "benchmarks/README.md", "benchmarks/LOG.md")


class DirtyTreeError(RuntimeError):
    """The measured code is not what the commit says."""


def worker_environment(threads: int, device: str) -> dict[str, str]:
    """Environment of every measured process: passive OpenMP waiting, a fixed number of threads, nothing online.

    GNU OpenMP's spinning threads burn CPU seconds while they wait (measured: 25 instead of 7.3 for the same work), so a
    comparison in CPU seconds needs it off; it must be set before torch is imported. Large pages for tensors, which btrm
    asks for itself, are on for every arm (LOG.md says what they give).
    """
    return {
        **os.environ,
        "GOMP_SPINCOUNT": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "THP_MEM_ALLOC_ENABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DS_ACCELERATOR": "cpu" if device == "cpu" else "cuda",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def restart_with(threads: int, device: str) -> None:
    """Replace this process by itself under `worker_environment`, unless it already runs under it.

    Thread settings must be there before torch is imported.
    """
    if os.environ.get("BTRM_BENCHMARK_PROCESS") == str(os.getpid()):
        return
    wanted = {**worker_environment(threads, device), "BTRM_BENCHMARK_PROCESS": str(os.getpid())}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def git_state(root: Path = ROOT) -> tuple[str | None, list[str]]:
    """Commit of the working tree and the paths that differ from it; (None, []) outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=all").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return None, []
    return commit, [path for path in changed if not path.startswith(OUTPUTS)]


def require_clean(allow_dirty: bool, root: Path = ROOT, vouched: str | None = None) -> dict[str, Any]:
    """Return {"commit", "dirty"} for the result.

    Args:
        allow_dirty: take a tree that no commit describes, and say so.
        root: where the tree is.
        vouched: the commit of a copy without its history, as on a machine that the files were copied to.

    Raises:
        DirtyTreeError: the tree has changes, or is no git checkout, and `allow_dirty` is false.
    """
    commit, changed = (vouched, []) if vouched else git_state(root)
    dirty = commit is None or bool(changed)
    if dirty and not allow_dirty:
        cause = f"{len(changed)} changed paths, e.g. {changed[0]}" if changed else "not a git checkout"
        raise DirtyTreeError(
            f"no result is written for code that no commit describes ({cause}): "
            "commit first, or pass --allow-dirty, which marks the result"
        )
    return {"commit": commit, "dirty": dirty}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory, and the GPU when the arms run on one. Imports torch only for a GPU."""
    out: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_properties(0)
        out.update(gpu=gpu.name, gpus=1, gpu_memory_gib=round(gpu.total_memory / 2**30, 1), cuda=torch.version.cuda)
    return out


def load_average() -> float:
    """Load of the last minute: how busy the machine was with anything."""
    return round(os.getloadavg()[0], 2)


def command_line() -> str:
    """The command that is running, without the directories of this machine."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {module.name}" if module else sys.argv[0]
    return " ".join(["python", name, *(named(word) for word in sys.argv[1:])])


def named(word: str) -> str:
    """A path of this machine by its last part; any other word as it is."""
    return Path(word).name if Path(word).is_absolute() else word


def reset_peak_memory(device: str) -> int:
    """Start counting the peak anew; returns the bytes held now (resident set on CPU, allocated on a GPU)."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # where a container forbids the reset, the peak includes loading
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def peak_memory(device: str) -> int:
    """Largest number of bytes held since `reset_peak_memory`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
