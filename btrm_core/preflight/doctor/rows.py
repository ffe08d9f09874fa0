"""Checks of what became of the rows: how many gave pairs, and what they hold that is not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from btrm_core.data import IssueReport, is_content
from btrm_core.preflight import Check


def rows_read(issues: Mapping[str, IssueReport]) -> Check:
    """How many rows gave pairs, and why the others did not.

    Args:
        issues: what was found in the rows of each part of the data.
    """
    rows, pairs, bad = (sum(getattr(i, name) for i in issues.values()) for name in ("rows", "pairs", "bad"))
    left_out = sum(sum(i.skipped.values()) for i in issues.values())
    empty = sum(sum(i.files.values()) for i in issues.values())
    figures = {"rows": rows, "pairs": pairs, "bad": bad, "left_out": left_out}
    aside = f", {left_out:,} rows without a preference left out" if left_out else ""
    if not bad and not empty:
        return Check("rows", "ok", f"{rows:,} rows give {pairs:,} pairs{aside}", figures=figures)
    first = next(i.first_bad for i in issues.values() if i.first_bad)
    return Check(
        "rows",
        "fail" if bad > rows / 2 else "warn",
        f"{bad:,} of {rows:,} rows are bad{aside} (first: {first})" if bad else str(first),
        "they are left out of the training",
        "mend them; `btrm data inspect SRC` lists every kind",
        figures,
    )


def content_unused(issues: Mapping[str, IssueReport]) -> Check | None:
    """What rows hold that is not trained on, and what was understood in an unusual way; None for nothing.

    Args:
        issues: what was found in the rows of each part of the data.
    """
    lines = [line.strip() for report in issues.values() for line in report.observations()]
    if not lines:
        return None
    unused: Counter[str] = Counter()
    for report in issues.values():
        unused.update(report.unused)
    lost = [name for name in unused if is_content(name)]
    figures = {"unused": dict(unused), "remarks": {k: v for r in issues.values() for k, v in r.remarks.items()}}
    if not lost:
        return Check("content of the rows", "ok", "; ".join(lines), figures=figures)
    return Check(
        "content of the rows",
        "warn",
        "; ".join(lines),
        f"{', '.join(lost)} may be a part of what was judged, and the model does not see it",
        "write it into the messages, or name the column that holds the text with --map",
        figures,
    )
