"""Fresh virtual environments and wheels, for tests of what happens when families are really installed.

An environment is empty but for one line that lets it see the packages of the environment in which the tests run (torch,
transformers, btrm itself), so that making one takes no time and nothing is downloaded. Families are installed into it,
as wheels, by pip.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

HANGS = 900
"""Seconds after which a program is taken to hang; no measure of speed, a busy machine stays far below."""
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


class Environment:
    """A virtual environment of its own in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        venv.create(directory, with_pip=False, symlinks=True)
        self.python = directory / "bin" / "python"
        packages = next(directory.glob("lib/python*/site-packages"))
        parent = sysconfig.get_paths()["purelib"]
        (packages / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n", encoding="utf-8")

    def install(self, *wheels: Path) -> None:
        self._pip("install", "--no-deps", "--no-index", *map(str, wheels))

    def uninstall(self, *distributions: str) -> None:
        self._pip("uninstall", "--yes", *distributions)

    def run(self, *arguments: str, timeout: float = HANGS, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python, away from the repository, as a user would."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "BTRM_CACHE": str(self.cache)}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.directory,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
        )

    def btrm(self, *arguments: str, timeout: float = HANGS) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "btrm_core", *arguments, timeout=timeout)

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    def _pip(self, *arguments: str) -> None:
        done = subprocess.run(
            [*_PIP, "--python", str(self.python), *arguments], capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, done.stderr


def write_wheel(
    directory: Path,
    distribution: str,
    *,
    version: str = "1.0",
    entry_points: Mapping[str, str],
    files: Mapping[str, str],
    requires: Iterable[str] = (),
) -> Path:
    """Write a wheel by hand: files, metadata, entry points, RECORD. Also such a wheel as no sane tool would build."""
    stem = f"{distribution.replace('-', '_')}-{version}"
    points = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    metadata = {
        "METADATA": "\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires), ""]),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": f"[btrm.families]\n{points}",
    }
    contents = {**files, **{f"{stem}.dist-info/{name}": text for name, text in metadata.items()}}
    record = f"{stem}.dist-info/RECORD"
    rows = []
    for path, text in contents.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(data)}")
    contents[record] = "\n".join([*rows, f"{record},,", ""])
    wheel = directory / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


def build_wheel(source: Path, directory: Path) -> Path:
    """Build a package with the tool that its pyproject.toml names (here installed already), from a copy."""
    copy = directory / "source" / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    target = directory / "wheels" / source.name
    command = [*_PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel
