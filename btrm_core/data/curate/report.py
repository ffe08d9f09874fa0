"""What `btrm data inspect` found, as lines of the terminal and as a report that becomes a page.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.data.curate.overview import Survey
from btrm_core.data.pairs import PairData
from btrm_core.data.quality import format_inspection
from btrm_core.evaluation import PairText, Report, Table, percent, short

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN_PAIRS = 40


def format_survey(found: Survey) -> str:
    """Return a survey for the terminal.

    Args:
        found: what `survey` found.

    Returns:
        Lines of text, joined: the inspection, then every table.
    """
    lines = [format_inspection(found.basic), ""]
    lines += [f"{table.title}\n{_lines(table)}" for table in tables_of(found) if table.title != "Subsets"]
    return "\n".join(lines)


def _lines(table: Table) -> str:
    from btrm_core.console import table as aligned

    rows = [[f"  {row[0]}", *(_cell(cell) for cell in row[1:])] for row in table.rows]
    return "\n".join(aligned(rows, right=range(1, len(table.columns)))) if rows else "  none"


def _cell(value: str | float | None) -> str:
    return value if isinstance(value, str) else "–" if value is None else f"{value:,}"


def tables_of(found: Survey) -> list[Table]:
    """Return everything that was counted as tables of name and number.

    Args:
        found: what `survey` found; what it did not look for has no table.
    """

    def table(title: str, rows: dict[Any, Any], note: str = "") -> Table:
        return Table(title, ("what", "number"), [(str(k), v) for k, v in rows.items()], note)

    out = [
        table("Labels (pairs)", found.labels),
        table("Roles (messages of prompts)", found.roles),
        table("Messages of a prompt (pairs)", found.turns),
        table("Pairs of a prompt (prompts)", found.pairs_per_prompt),
        table("Control tokens spelled in text (pairs)", found.control_tokens),
        table("Preferences in a circle", {k: v for k, v in found.cycles.items() if k != "examples"}),
    ]
    if found.near_duplicates is not None:
        out.append(table("Near-duplicate prompts", {k: found.near_duplicates[k] for k in ("count", "prompts")}))
    if found.against is not None:
        out.append(table("In the other data (pairs)", {k: v for k, v in found.against.items() if k != "examples"}))
    if found.tokens is not None:
        rows: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            rows |= {f"{side}, {name}": value for name, value in found.tokens[side].items()}
        rows["more tokens wins"] = percent(found.tokens["longer_wins_tokens"])
        names = {"separate": "each conversation alone", "padded": "padded, 8 pairs together"}
        names |= {"shared": "a pair's prompt once", "trees": "every common beginning once"}
        rows |= {f"tokens, {label}": found.tokens[name] for name, label in names.items()}
        rows["padded over pairs' prompts once"] = f"{found.tokens['padded_over_shared']:.2f} times"
        rows["padded over common beginnings once"] = f"{found.tokens['padded_over_trees']:.2f} times"
        out.append(table(f"Tokens ({found.tokens['pairs']:,} pairs counted)", rows))
    out.append(table("Subsets", {name or "(none)": n for name, n in found.basic["subsets"].items()}))
    return out


def survey_report(data: PairData, found: Survey, sources: Sequence[str]) -> Report:
    """Return a survey as a report to be written as a page, with pictures and some pairs to read.

    Args:
        data: P pairs, of which at most `SHOWN_PAIRS`, spread evenly, are shown.
        found: what `survey` found in them.
        sources: where they are from, for the title.
    """
    places = np.linspace(0, len(data) - 1, min(SHOWN_PAIRS, len(data))).round().astype(int)
    sample = []
    for place in np.unique(places):
        pair = data[int(place)]
        text = PairText(tuple((m["role"], m["content"]) for m in pair.prompt), pair.chosen, pair.rejected)
        sample.append((pair.id, pair.subset, text))
    return Report(
        title=f"Preference data: {', '.join(short(source) for source in sources)}",
        evaluations=(),
        facts={
            "pairs": f"{len(data):,}",
            "more characters wins": percent(found.basic["longer_wins_characters"]),
            "fingerprint": data.fingerprint[:12],
            **{name: f"{finding['count']:,}" for name, finding in found.basic["findings"].items()},
        },
        tables=tables_of(found),
        lengths=character_lengths(data),
        sample=sample,
        extra={"survey": found.to_dict()},
    )


def character_lengths(data: PairData) -> NDArray[np.int64]:
    """Characters of both answers of every pair, without their prompts.

    Args:
        data: P pairs, at least one.

    Returns:
        int64 [P, 2], chosen and rejected.
    """
    import pyarrow.compute as pc

    parts = []
    for table in data.dataset.with_format("arrow").select_columns(["chosen", "rejected"]).iter(batch_size=10_000):
        parts.append(np.stack([pc.utf8_length(table[s]).to_numpy() for s in ("chosen", "rejected")], axis=1))
    return np.concatenate(parts).astype(np.int64)
