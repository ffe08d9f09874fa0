"""A verdict of `btrm doctor` out of an error that btrm raised."""

from __future__ import annotations

from btrm_core.preflight import Check


def refused(name: str, error: Exception, why: str, what_to_do: str) -> Check:
    """A failure out of an error of btrm's; `what_to_do` stands in where its message does not end in advice.

    Args:
        name: of the check.
        error: what was raised.
        why: why it matters.
        what_to_do: what to do, unless the error says it.
    """
    message = " ".join(str(error).split())
    what, _, advice = message.rpartition("; ")
    if not what or advice.startswith("expected"):
        return Check(name, "fail", message.rstrip("."), why, what_to_do)
    return Check(name, "fail", what, why, advice)
