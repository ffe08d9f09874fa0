"""One verdict of `btrm doctor`: what was found, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """How one check ended.

    Attributes:
        name: the check in a few words.
        verdict: "ok", "warn", "fail" or "skip".
        what: what was found.
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


def refused(name: str, error: Exception, why: str, what_to_do: str) -> Check:
    """A failure out of an error of btrm's; `what_to_do` stands in where its message does not end in advice."""
    message = " ".join(str(error).split())
    what, _, advice = message.rpartition("; ")
    if not what or advice.startswith("expected"):
        return Check(name, "fail", message.rstrip("."), why, what_to_do)
    return Check(name, "fail", what, why, advice)
