"""The code of a model card, taken from its text."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any


def blocks(card: str) -> dict[str, str]:
    """The code of each way of use by its title."""
    found = re.findall(r"^([^\n`]+):\n\n(```+)\w+\n(.*?)\n\2$", card, re.DOTALL | re.MULTILINE)
    return {title: code for title, _, code in found}


def read_blocks(directory: Path) -> dict[str, str]:
    """The code of the card of a model directory."""
    return blocks((directory / "README.md").read_text(encoding="utf-8"))


def printed(code: str) -> tuple[float, dict[str, Any]]:
    """Run code that prints one number; returns it and the code's names."""
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return float(out.getvalue()), names
