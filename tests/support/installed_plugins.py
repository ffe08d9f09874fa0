"""A fixture that lays out plugins on disk as pip installs them."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out a distribution with one entry point, as pip leaves it, and remove its module afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def add(source, *, name="foo", distribution=None, version="1.0", value=None, requires=(), files=None):
        distribution = distribution or f"btrm-{name}"
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source).lstrip(), encoding="utf-8")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {r}" for r in requires]) + "\n")
        (info / "entry_points.txt").write_text(f"[btrm.families]\n{name} = {value or module}\n", encoding="utf-8")
        for file, content in (files or {}).items():
            (info / file).write_bytes(content)
        importlib.invalidate_caches()
        modules.append(module)
        return distribution

    yield add
    for module in modules:
        sys.modules.pop(module, None)
