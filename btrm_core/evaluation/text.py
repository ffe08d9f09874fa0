"""Evaluations as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btrm_core.console import table
from btrm_core.evaluation.assess import Evaluation
from btrm_core.evaluation.compare import Comparison, Difference
from btrm_core.evaluation.statistics import Interval


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """One line about an evaluation.

    Args:
        figures: an evaluation as training keeps it in its log.
    """
    ties = f", {figures['ties']} ties" if figures["ties"] else ""
    ties += f", {figures['undecided']} without a better answer left out" if figures.get("undecided") else ""
    return (
        f"held-out accuracy {figures['accuracy']:.3f} ± {figures['accuracy_standard_error']:.3f} "
        f"(more tokens wins: {figures['longer_wins_tokens']:.3f}), loss {figures['loss']:.4f}, "
        f"reward margin {figures['reward_margin']:.3f}, {figures['pairs']} pairs{ties}"
    )


def subset_table(rows: list[Mapping[str, Any]]) -> str:
    """Accuracy per subset, one line each.

    Args:
        rows: subsets with name, accuracy, reward_margin and pairs.
    """
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


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right.

    Args:
        columns: headings.
        rows: as many cells each; line breaks in them become spaces.

    >>> print(aligned(("name", "pairs"), [("a", "1,000"), ("long", "2")]))
    name  pairs
    a     1,000
    long      2
    """
    cells = [[" ".join(cell.split()) for cell in row] for row in (columns, *rows)]
    return "\n".join(table(cells, right=range(1, len(columns))))


def percent(share: float | None, digits: int = 1) -> str:
    """A share for the reader.

    Args:
        share: 0 to 1; None is a dash.
        digits: after the point.

    >>> percent(0.8647), percent(None)
    ('86.5 %', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def figure(value: float | None, digits: int = 3) -> str:
    """A number for the reader.

    Args:
        value: None is a dash.
        digits: after the point.
    """
    return "–" if value is None else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign.

    Args:
        value: None is a dash.
        digits: after the point.
    """
    return "–" if value is None else f"{round(value, digits) + 0.0:+,.{digits}f}"  # never -0.00


def short(name: str) -> str:
    """The last part of a path or hub id that tells something.

    Args:
        name: of a model or a set of pairs.

    >>> short("runs/llama3/model"), short("data/held_out.jsonl"), short("org/name")
    ('llama3', 'held_out.jsonl', 'name')
    """
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":  # the name of the model's directory in every run
        parts.pop()
    return parts[-1] if parts else name


def overview(evaluations: Sequence[Evaluation]) -> str:
    """Several models and sets of pairs in one table.

    Args:
        evaluations: one row each.
    """
    rows = []
    for found in evaluations:
        by_unit = {bias.unit: bias for bias in found.length}
        tokens, characters = by_unit.get("tokens"), by_unit.get("characters")
        controlled = found.length[0].controlled if found.length else None
        rows.append(
            (
                short(found.model),
                short(found.data),
                f"{found.accuracy.pairs:,}",
                percent(found.accuracy.half),
                interval_text(found.accuracy.interval),
                f"{found.accuracy.ties:,}",
                figure(found.calibration.before.loss),
                figure(found.calibration.before.brier),
                percent(found.calibration.before.ece),
                percent(tokens.longer_wins if tokens else None),
                percent(characters.longer_wins if characters else None),
                percent(controlled),
            )
        )
    columns = ("model", "pairs from", "pairs", "accuracy", "95 % interval", "ties", "loss", "Brier", "ECE")
    return aligned((*columns, "more tokens", "more characters", "length-controlled"), rows)


def interval_text(interval: Interval | None) -> str:
    """An interval of a share, in percent.

    Args:
        interval: of a share from 0 to 1; None is a dash.
    """
    return "–" if interval is None else f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def evaluation_details(found: Evaluation) -> str:
    """What the overview of one evaluation leaves out, in a few lines.

    Args:
        found: of one model on one set of pairs.
    """
    accuracy, calibration = found.accuracy, found.calibration
    lines = [f"{short(found.model)} on {found.data}"]
    left_out = [(found.undecided, "without a better answer"), (found.unscored, "without two finite rewards")]
    counted = [f"{number:,} {why} left out" for number, why in left_out if number]
    lines.append("  " + "; ".join([f"{accuracy.pairs:,} pairs of {accuracy.prompts:,} prompts", *counted]))
    lines.append(
        f"  accuracy {percent(accuracy.half)} with ties half, {percent(accuracy.strict)} with ties wrong, "
        f"{percent(accuracy.excluded)} without ties"
    )
    if calibration.after is not None:
        lines.append(
            f"  with temperature {figure(calibration.temperature, 2)}: loss {figure(calibration.after.loss)}, "
            f"Brier {figure(calibration.after.brier)}, ECE {percent(calibration.after.ece)} "
            "(fitted on other prompts than judged on)"
        )
    for bias in found.length:
        parts = (("longer", bias.chosen_longer), ("similar", bias.similar), ("shorter", bias.chosen_shorter))
        shown = ", ".join(f"{name} {percent(part.half)} ({part.pairs:,})" for name, part in parts if part is not None)
        lines.append(
            f"  chosen by {bias.unit}: {shown}; correlation {signed(bias.correlation)}, "
            f"length coefficient {signed(bias.length_coefficient)}"
        )
    buckets = ", ".join(f"{b.low:.2g} to {b.high:.2g}: {percent(b.accuracy.half)}" for b in found.by_margin)
    lines.append(f"  accuracy by size of the reward margin: {buckets}")
    if found.suspects is not None:
        lines.append(f"  {found.suspects:,} suspects of label noise")
    if found.subsets:
        columns = ("  subset", "pairs", "accuracy", "95 % interval", "ties", "loss")
        rows = [
            (
                f"  {part.name or '(none)'}",
                f"{part.accuracy.pairs:,}",
                percent(part.accuracy.half),
                interval_text(part.accuracy.interval),
                f"{part.accuracy.ties:,}",
                figure(part.loss),
            )
            for part in found.subsets
        ]
        lines += ["  " + line for line in aligned(columns, rows).split("\n")]
    return "\n".join(lines)


def comparison_text(found: Comparison) -> str:
    """What may be said of two models on the same pairs.

    Args:
        found: of two models on the same pairs.
    """
    overall = found.overall
    verdict = "no difference shown"
    if overall.shown:
        verdict = f"{short(found.first if overall.difference > 0 else found.second)} is better"
    lines = [
        f"{short(found.first)} {percent(overall.first)} against {short(found.second)} {percent(overall.second)} "
        f"on the same {overall.pairs:,} pairs: {verdict}",
        f"  difference {_points(overall)}, McNemar p = {overall.p_value:.3g}; only the first right "
        f"{overall.only_first:,}, only the second {overall.only_second:,}",
        f"  ordered alike {percent(found.agreement)}; the smallest difference this data would have shown four times "
        f"in five: {100 * overall.smallest_detectable:.1f} points",
    ]
    if found.only_in_first or found.only_in_second:
        lines.append(f"  left out: {found.only_in_first:,} pairs of the first, {found.only_in_second:,} of the second")
    if found.by_id:
        lines.append("  the pairs have equal ids but no equal prompts: is it the same data?")
    if found.subsets:
        rows = [
            (f"  {s.name or '(none)'}", f"{s.pairs:,}", _points(s), f"{s.p_corrected:.3g}", s.verdict)
            for s in found.subsets
        ]
        table = aligned(("  subset", "pairs", "difference", "p (Holm)", "verdict"), rows)
        lines += ["  " + line for line in table.split("\n")]
    return "\n".join(lines)


def _points(found: Difference) -> str:
    ends = found.interval
    shown = f" ({100 * ends.low:+.1f} to {100 * ends.high:+.1f})" if ends is not None else ""
    return f"{100 * found.difference:+.1f} points{shown}"
