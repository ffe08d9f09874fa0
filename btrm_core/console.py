"""What a person is shown: remarks beside the progress bar, JSON, tables.

Decides: that remarks go to standard error, once over all processes, and that JSON knows no NaN.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any, Protocol


class Member(Protocol):
    """One of the processes of a run, or the only one."""

    @property
    def is_main(self) -> bool:
        """True on the one process that prints."""


def say(runtime: Member, text: str) -> None:
    """Print one remark to standard error, once over all processes, without breaking the bar."""
    if runtime.is_main:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def finite_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: it becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def dumps(value: Any) -> str:
    """JSON as btrm prints it on standard output."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
