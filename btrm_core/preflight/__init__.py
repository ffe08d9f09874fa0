"""Preflight: what is asked before GPU hours are spent: `doctor`, `plan` and `conformance`, and the verdict they share.

Imports nothing of btrm's: `python -m btrm_core.preflight.conformance.probe` measures what importing a family costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """How one check ended.

    Attributes:
        name: the check in a few words, e.g. "pad token is safe".
        verdict: "ok", "warn", "fail" or "skip".
        what: what was found or proved; what is wrong; or why it was skipped.
        why: why that matters; empty unless it is a warning or a failure.
        what_to_do: what to change; empty unless it is a warning or a failure.
        figures: the numbers behind it, by name.
    """

    name: str
    verdict: str
    what: str
    why: str = ""
    what_to_do: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
