"""An evaluation as a page to be shown: one HTML file that opens from disk, with `report.json` and the pictures beside.

Decides: what a report holds. The page loads nothing: style, script, pictures and texts are in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrm_core.errors import DataError
from btrm_core.evaluation.assess import Evaluation
from btrm_core.evaluation.compare import Comparison
from btrm_core.evaluation.plots import (
    Plot,
    plot_of_comparison,
    plot_of_models,
    plot_of_training,
    plots_of,
    plots_of_lengths,
    require_matplotlib,
)
from btrm_core.evaluation.scores import PairRewards, PairText
from btrm_core.evaluation.text import (
    aligned,
    comparison_text,
    evaluation_details,
    figure,
    overview,
    percent,
    short,
    signed,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LONGEST_TEXT = 6000
"""Characters of a message that the page shows; the file of rewards holds the whole."""
_SHOWN_CASES = 60


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Attributes:
        title: its heading.
        evaluations: every model on every set of pairs, with the rewards it was computed from.
        comparisons: pairs of models, with the rewards of the first.
        training: lines of a run's `metrics.jsonl`.
        facts: what else the reader should know, by name: versions, dates, settings.
        tables: further tables: a title, the names of the columns, the rows.
        lengths: characters of both answers of every pair (P, 2) of a data set, to be drawn.
        sample: pairs of a data set to be read: id, subset, text.
        extra: further JSON values for `report.json`.
    """

    title: str
    evaluations: Sequence[tuple[Evaluation, PairRewards]]
    comparisons: Sequence[tuple[Comparison, PairRewards]] = ()
    training: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    lengths: NDArray[np.int64] | None = None
    sample: Sequence[tuple[str, str, PairText]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a report; a cell is text, or a number with the way it is written."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""


def write_report(report: Report, directory: str | Path) -> Path:
    """Write `report.html`, `report.json` and the pictures as PNG; returns the page.

    Args:
        report: what is shown.
        directory: made if it is missing; files of these names in it are replaced.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: the directory cannot be written.
    """
    require_matplotlib()
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        page, values = render(report, folder), to_json(report)
        # Half a surrogate pair, which only an escape in JSON can write, stays an escape there and is lost on the page.
        (folder / "report.json").write_text(values + "\n", encoding="utf-8", errors="backslashreplace")
        (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"cannot write the report {folder}: {error.strerror or error}; name another --report"
        ) from error
    return folder / "report.html"


def to_json(report: Report) -> str:
    """All figures of a report.

    Args:
        report: its numbers must be finite or None.
    """
    values = {
        "title": report.title,
        "facts": dict(report.facts),
        "evaluations": [evaluation.to_dict() for evaluation, _ in report.evaluations],
        "comparisons": [comparison.to_dict() for comparison, _ in report.comparisons],
        **report.extra,
    }
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)


def render(report: Report, directory: Path) -> str:
    """The page as text; its pictures are written to `directory` on the way.

    Args:
        report: what is shown; texts in it are escaped.
        directory: must exist.
    """
    import jinja2

    folder = resources.files("btrm_core") / "evaluation" / "report"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "signed": signed, "short": short}
    sections = [
        _section(evaluation, rewards, number, _label(evaluation, report), directory)
        for number, (evaluation, rewards) in enumerate(report.evaluations, start=1)
    ]
    models = [(_label(e, report), e.accuracy) for e, _ in report.evaluations]
    training = plot_of_training(report.training, directory) if report.training else None
    sample = [{"id": name, "subset": subset, "text": _shown(text)} for name, subset, text in report.sample]
    return environment.get_template("report.html").render(
        report=report,
        sections=sections,
        models=plot_of_models(models, directory) if len(models) > 1 else None,
        comparisons=[_compared(c, rewards, n, directory) for n, (c, rewards) in enumerate(report.comparisons, start=1)],
        training=training,
        lengths=[] if report.lengths is None else plots_of_lengths(report.lengths, directory),
        sample=sample,
        style=(folder / "report.css").read_text(encoding="utf-8"),
        script=(folder / "report.js").read_text(encoding="utf-8"),
    )


def _label(evaluation: Evaluation, report: Report) -> str:
    """The least that tells an evaluation from the others."""
    several_models = len({e.model for e, _ in report.evaluations}) > 1
    several_sets = len({e.data for e, _ in report.evaluations}) > 1
    model, name = short(evaluation.model), short(evaluation.data) or "Evaluation"
    return f"{model}, {name}" if several_models and several_sets else name if not several_models else model


def _section(evaluation: Evaluation, rewards: PairRewards, number: int, label: str, directory: Path) -> dict[str, Any]:
    plots: list[Plot] = plots_of(evaluation, rewards, f"{number}-", directory)
    cases = [
        {
            "id": case.id,
            "subset": case.subset,
            "chosen": case.chosen_reward,
            "rejected": case.rejected_reward,
            "probability": case.probability,
            "text": _text(rewards, case.place),
        }
        for case in evaluation.worst[:_SHOWN_CASES]
    ]
    return {"number": number, "label": label, "evaluation": evaluation, "plots": plots, "cases": cases}


def _compared(comparison: Comparison, rewards: PairRewards, number: int, directory: Path) -> dict[str, Any]:
    cases = [
        {
            "id": case.id,
            "subset": case.subset,
            "first": case.first_margin,
            "second": case.second_margin,
            "text": _text(rewards, case.first_place),
        }
        for case in comparison.disagreements[:_SHOWN_CASES]
    ]
    plot = plot_of_comparison(comparison, f"comparison-{number}", directory)
    return {"number": number, "comparison": comparison, "plot": plot, "cases": cases}


def _text(rewards: PairRewards, place: int) -> dict[str, Any] | None:
    if rewards.text is None:
        return None
    return _shown(rewards.text(place))


def _shown(text: PairText) -> dict[str, Any]:
    prompt = [(role, shortened(content)) for role, content in text.prompt]
    return {"prompt": prompt, "chosen": shortened(text.chosen), "rejected": shortened(text.rejected)}


def shortened(text: str) -> str:
    """A text for the page, with a remark where it is cut.

    Args:
        text: kept whole up to `LONGEST_TEXT` characters.
    """
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest:,} more characters)"


def report_text(report: Report) -> str:
    """A report for the terminal.

    Args:
        report: its overview, details, comparisons and tables are shown, in this order.
    """
    parts = []
    if report.evaluations:
        evaluations = [evaluation for evaluation, _ in report.evaluations]
        parts.append(overview(evaluations))
        parts += [evaluation_details(evaluation) for evaluation in evaluations]
    parts += [comparison_text(comparison) for comparison, _ in report.comparisons]
    for table in report.tables:
        rows = [tuple(_cell(cell) for cell in row) for row in table.rows]
        parts.append("\n".join([table.title, *([table.note] if table.note else []), aligned(table.columns, rows)]))
    return "\n\n".join(parts)


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else figure(value)
