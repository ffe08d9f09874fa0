"""Fresh virtual environments and wheels, for tests of what happens when families are really installed.

An environment is empty but for one line that lets it see the packages of the environment in which the tests run (torch,
transformers, btrm itself), so that making one takes no time and nothing is downloaded. Families are installed into it,
as wheels, by pip. An environment of requirements sees those distributions alone, and what they require in turn: what a
stranger has who installs a package, and not what else a developer has.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HANGS = 900
"""Seconds after which a program is taken to hang; no measure of speed, a busy machine stays far below."""
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


class Environment:
    """A virtual environment of its own in `directory`: with all packages of the tests, or those of `requirements`."""

    def __init__(self, directory: Path, requirements: Iterable[str] | None = None) -> None:
        self.directory = directory
        venv.create(directory, with_pip=False, symlinks=True)
        self.python = directory / "bin" / "python"
        self.packages = packages = next(directory.glob("lib/python*/site-packages"))
        if requirements is not None:
            for path in _installed(requirements):
                (packages / path.name).symlink_to(path)
            return
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


def _installed(requirements: Iterable[str]) -> set[Path]:
    """Where the distributions lie that are required, directly and in turn; fails if one of them is not installed."""
    found: set[Path] = set()
    waiting, seen = [Requirement(text) for text in requirements], set()
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), *sorted(wanted.extras))
        asked = [{"extra": extra} for extra in ("", *wanted.extras)]
        if key in seen or (wanted.marker and not wanted.marker.evaluate(asked[0])):
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(wanted.name)
        for file in distribution.files or ():
            if file.parts[0] not in ("..", "__pycache__"):
                found.add(Path(str(distribution.locate_file(file.parts[0]))))
        for further in map(Requirement, distribution.requires or ()):
            if not further.marker or any(further.marker.evaluate(extra) for extra in asked):
                further.marker = None
                waiting.append(further)
    return found


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


def build_wheel(source: Path, directory: Path, parts: Iterable[str] | None = None) -> Path:
    """Build a package with the tool that its pyproject.toml names (here installed already), from a copy.

    Only the `parts` of its folder are copied, if any are named.
    """
    copy = directory / "source" / source.name
    kept = None if parts is None else set(parts)

    def left_out(folder: str, names: list[str]) -> set[str]:
        caches = {name for name in names if name in ("__pycache__", ".pytest_cache")}
        return caches if kept is None or Path(folder) != source else set(names) - kept

    shutil.copytree(source, copy, ignore=left_out)
    target = directory / "wheels" / source.name
    command = [*_PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(target), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel
