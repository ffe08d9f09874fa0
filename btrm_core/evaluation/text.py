"""Evaluations as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btrm_core.console import table


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """One line about an evaluation."""
    ties = f", {figures['ties']} ties" if figures["ties"] else ""
    ties += f", {figures['undecided']} without a better answer left out" if figures.get("undecided") else ""
    return (
        f"held-out accuracy {figures['accuracy']:.3f} ± {figures['accuracy_standard_error']:.3f} "
        f"(more tokens wins: {figures['longer_wins_tokens']:.3f}), loss {figures['loss']:.4f}, "
        f"reward margin {figures['reward_margin']:.3f}, {figures['pairs']} pairs{ties}"
    )


def subset_table(rows: list[Mapping[str, Any]]) -> str:
    """Accuracy per subset, one line each."""
    cells = [
        (
            "",
            str(r["name"]),
            f"accuracy {r['accuracy']:.3f}",
            f"margin {r['reward_margin']:+.3f}",
            f"pairs {r['pairs']}",
        )
        for r in rows
    ]
    return "\n".join(table(cells))


def format_evaluation(result: dict[str, Any]) -> str:
    """An evaluation for the screen: a line per source, its subsets, and what was left out."""
    family = f", family {result['family']}" if result["family"] else ""
    lines = [f"{result['model']}{family}, {result['dtype']}, {result['pairs_per_second']:.1f} pairs/s"]
    everything = {"all": result["overall"]} if len(result["sources"]) > 1 else {}
    for name, figures in {**result["sources"], **everything}.items():
        lines.append(f"{name}: {evaluation_text(figures).removeprefix('held-out ')}")
        if name in result["sources"]:
            lines += [subset_table(figures["subsets"])] if "subsets" in figures else []
            lines += ["  " + note.replace("\n", "\n  ") for note in figures["notes"]]
    return "\n".join(lines)
