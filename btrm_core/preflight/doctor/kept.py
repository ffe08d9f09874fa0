"""Doctor's look at what the template makes of the messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from btrm_core.preflight import Check

ALTERED_FAIL = 0.5
"""Share of pairs from which on a template is taken to be the wrong one."""


def messages_kept(reports: Sequence[Mapping[str, Any]]) -> Check:
    """Whether every message stands in its rendered conversation, verbatim and in order.

    Args:
        reports: what became of the pairs of each part of the data, from the token store.
    """
    given = sum(report["given"] for report in reports)
    found: Counter[str] = Counter()
    for report in reports:
        found.update(report["altered"])
    figures = {"pairs": given, "altered": dict(found)}
    if not found:
        what = f"every message of {given:,} pairs is in its conversation, verbatim and in order"
        return Check("messages", "ok", what, figures=figures)
    reason, most = found.most_common(1)[0]
    first = next(report["examples"][reason][0] for report in reports if reason in report["examples"])
    number = sum(found.values())
    return Check(
        "messages",
        "fail" if number > ALTERED_FAIL * given else "warn",
        f"in {number:,} of {given:,} pairs messages are written otherwise than the data has them; in most ({most:,}) "
        f"{reason} (first: {first})",
        "the model learns from other text than you gave it",
        "mend the template, or give another one with --set tokenizer.chat_template=FILE",
        figures,
    )


def positions(impossible: bool, what: str) -> Check:
    """A conversation that is longer than what the model has positions for, or has seen.

    Args:
        impossible: whether the model has no such positions, or has only never seen them.
        what: the problem, a colon, and what to do about it, as `positions_problem` says it.

    Returns:
        A failure where it is impossible, else a warning.
    """
    problem, _, advice = what.rpartition(": ")
    why = "the model cannot be asked about it" if impossible else "rewards there are extrapolated"
    return Check("positions", "fail" if impossible else "warn", problem, why, advice)
