"""What is drawn of an evaluation, a comparison, a run and a data set. How it is drawn is `drawing`'s decision.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.evaluation.assess import Bucket, Evaluation
from btrm_core.evaluation.calibration import Reliability
from btrm_core.evaluation.compare import Comparison
from btrm_core.evaluation.plots.drawing import (
    CHOSEN,
    GRID,
    INK,
    MUTED,
    REJECTED,
    Plot,
    accuracy_dot,
    draw,
    edges_of,
    height_of,
    short_name,
)
from btrm_core.evaluation.scores import PairRewards
from btrm_core.evaluation.statistics import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plots_of(evaluation: Evaluation, rewards: PairRewards, prefix: str, directory: Path) -> list[Plot]:
    """All pictures of one evaluation; `prefix` makes their names different from another evaluation's.

    Args:
        evaluation: what was found of the pairs.
        rewards: the pairs; ties and pairs without two finite rewards are left out.
        prefix: put before every file name.
        directory: must exist.

    Returns:
        The pictures, in the order of the page.
    """
    kept = rewards.reward_P2[np.isfinite(rewards.reward_P2).all(axis=1) & (rewards.probability_P > 0.5)]
    calibration = evaluation.calibration

    def named(name: str) -> str:
        return f"{prefix}{name}"

    found = [
        draw(named("rewards"), "How the rewards of chosen and rejected answers are distributed",
             lambda axes: _histogram(axes, kept), directory),
        draw(named("margins"), "How the reward margins (chosen minus rejected) are distributed; left of 0 is wrong",
             lambda axes: _margins(axes, kept[:, 0] - kept[:, 1]), directory),
        draw(named("calibration"), "How often the preferred answer is right, against what its reward margin promises",
             lambda axes: _reliability(axes, calibration.before, calibration.after), directory),
        draw(named("buckets"), "Accuracy by the size of the reward margin, in fifths of the pairs, with 95 % intervals",
             lambda axes: _buckets(axes, evaluation.by_margin, "size of the reward margin"), directory),
    ]  # fmt: skip
    if evaluation.by_data_margin:
        found.append(
            draw(named("data-margin"), "Accuracy by the margin that the data gives, with 95 % intervals",
                 lambda axes: _buckets(axes, evaluation.by_data_margin, "margin in the data"), directory)
        )  # fmt: skip
    if evaluation.length:
        found.append(
            draw(named("length"), "Accuracy by which answer is longer (more than 10 %), with 95 % intervals",
                 lambda axes: _length(axes, evaluation), directory)
        )  # fmt: skip
    if evaluation.subsets:
        rows = [(part.name or "(none)", part.accuracy) for part in evaluation.subsets]
        found.append(
            draw(named("subsets"), "Accuracy of every subset with 95 % intervals",
                 lambda axes: _dots(axes, rows), directory, height_of(len(rows)))
        )  # fmt: skip
    return found


def plot_of_models(rows: Sequence[tuple[str, Accuracy]], directory: Path) -> Plot:
    """Accuracy of several models side by side.

    Args:
        rows: name and accuracy each, from the top.
        directory: must exist.
    """
    caption = "Accuracy of every model with 95 % intervals; on the same pairs, read the paired comparison instead"
    return draw("models", caption, lambda axes: _dots(axes, rows), directory, height_of(len(rows)))


def plot_of_comparison(comparison: Comparison, name: str, directory: Path) -> Plot:
    """Differences between two models, all pairs and each subset.

    Args:
        comparison: of two models on the same pairs.
        name: of the file, without ending.
        directory: must exist.
    """
    rows = [comparison.overall, *comparison.subsets]

    def paint(axes: Axes) -> None:
        for place, row in enumerate(reversed(rows)):
            colour = CHOSEN if row.shown else MUTED
            if row.interval is not None:
                axes.plot([100 * row.interval.low, 100 * row.interval.high], [place, place], color=colour)
            axes.plot([100 * row.difference], [place], "o", color=colour, markersize=5)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(
            range(len(rows)), [short_name(row.name or "all pairs") for row in reversed(rows)], parse_math=False
        )
        axes.set_xlabel("difference in points")
        axes.set_ylim(-0.6, len(rows) - 0.4)

    caption = "First model minus second, with 95 % intervals of the paired difference; grey: no difference shown"
    return draw(name, caption, paint, directory, height_of(len(rows)))


def plot_of_training(lines: Sequence[Mapping[str, Any]], directory: Path) -> Plot | None:
    """Loss over the steps of a run, from the lines of its `metrics.jsonl`; None if they hold no loss.

    Args:
        lines: with `split`, `step` and `loss` (nats).
        directory: must exist.
    """

    def points(split: str) -> tuple[list[int], list[float]]:
        rows = [row for row in lines if row.get("split") == split and isinstance(row.get("loss"), int | float)]
        return [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]

    train, held = points("train"), points("eval")
    if not train[0] and not held[0]:
        return None

    def paint(axes: Axes) -> None:
        if train[0]:
            axes.plot(*train, color=GRID, linewidth=1)
            width = max(1, len(train[0]) // 30)
            smooth = np.convolve(train[1], np.ones(width) / width, mode="valid")
            axes.plot(train[0][width - 1 :], smooth, color=CHOSEN, label="training")
        if held[0]:
            axes.plot(*held, "o-", color=REJECTED, markersize=4, label="held out")
        axes.axhline(np.log(2), color=MUTED, linewidth=1, linestyle=":")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend()

    return draw("training", "Loss over the steps of training; dotted: ln 2, what no idea gets", paint, directory)


def plots_of_lengths(length_P2: np.ndarray, directory: Path) -> list[Plot]:
    """How long the answers of a data set are, and by how much the chosen ones are longer.

    Args:
        length_P2: characters of chosen and rejected answers [P, 2].
        directory: must exist.
    """

    def both(axes: Axes) -> None:
        edges = np.geomspace(1, max(2, int(length_P2.max())), 40).tolist()
        for column, colour, label in ((1, REJECTED, "rejected"), (0, CHOSEN, "chosen")):
            axes.hist(np.maximum(length_P2[:, column], 1), edges, color=colour, alpha=0.28)
            axes.hist(np.maximum(length_P2[:, column], 1), edges, color=colour, histtype="step", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("characters of an answer")
        axes.set_ylabel("answers")
        axes.legend()

    def difference(axes: Axes) -> None:
        longer_P = length_P2[:, 0] - length_P2[:, 1]
        edges = edges_of(longer_P)
        longer_P = np.clip(longer_P, edges[0], edges[-1])
        axes.hist(longer_P[longer_P >= 0], edges, color=CHOSEN, alpha=0.75, label="chosen longer (or equal)")
        axes.hist(longer_P[longer_P < 0], edges, color=REJECTED, alpha=0.75, label="rejected longer")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("characters that the chosen answer has more")
        axes.set_ylabel("pairs")
        axes.legend()

    return [
        draw("lengths", "How long the answers are, in characters", both, directory),
        draw("length-differences", "By how many characters the chosen answer is longer", difference, directory),
    ]


def _histogram(axes: Axes, reward_P2: np.ndarray) -> None:
    edges = edges_of(reward_P2)
    reward_P2 = np.clip(reward_P2, edges[0], edges[-1])
    for column, colour, label in ((1, REJECTED, "rejected"), (0, CHOSEN, "chosen")):
        axes.hist(reward_P2[:, column], edges, color=colour, alpha=0.28)
        axes.hist(reward_P2[:, column], edges, color=colour, histtype="step", label=label, linewidth=1.6)
    axes.set_xlabel("reward")
    axes.set_ylabel("answers")
    axes.legend()


def _margins(axes: Axes, margin_P: np.ndarray) -> None:
    edges = edges_of(margin_P)
    margin_P = np.clip(margin_P, edges[0], edges[-1])
    axes.hist(margin_P[margin_P >= 0], edges, color=CHOSEN, alpha=0.75, label="right (or tied)")
    axes.hist(margin_P[margin_P < 0], edges, color=REJECTED, alpha=0.75, label="wrong")
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("reward margin")
    axes.set_ylabel("pairs")
    axes.legend()


def _reliability(axes: Axes, before: Reliability, after: Reliability | None) -> None:
    axes.plot([50, 100], [50, 100], color=MUTED, linewidth=1, linestyle=":")
    for found, colour, label in ((before, REJECTED, "as it is"), (after, CHOSEN, "with temperature")):
        if found is not None:
            confidence = [100 * one.confidence for one in found.bins]
            right = [100 * one.accuracy for one in found.bins]
            axes.plot(
                confidence, right, "o-", color=colour, markersize=4, label=f"{label}: ECE {100 * found.ece:.1f} %"
            )
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("right, %")
    axes.set_xlim(49, 101)
    axes.legend()


def _buckets(axes: Axes, buckets: Sequence[Bucket], label: str) -> None:
    for place, bucket in enumerate(buckets):
        accuracy_dot(axes, place, bucket.accuracy, upright=True)
    names = [f"{b.low:.2g}" if b.low == b.high else f"{b.low:.2g} to\n{b.high:.2g}" for b in buckets]
    axes.set_xticks(range(len(buckets)), names)
    axes.set_xlim(-0.5, len(buckets) - 0.5)
    axes.axhline(50, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")


def _length(axes: Axes, evaluation: Evaluation) -> None:
    bias = evaluation.length[0]
    names = []
    for place, (name, found) in enumerate(
        (("chosen\nlonger", bias.chosen_longer), ("similar", bias.similar), ("chosen\nshorter", bias.chosen_shorter))
    ):
        names.append(f"{name}\n({found.pairs if found else 0:,})")
        if found is not None:
            accuracy_dot(axes, place, found, upright=True)
    axes.axhline(100 * evaluation.accuracy.half, color=CHOSEN, linewidth=1, linestyle="--", label="all pairs")
    axes.axhline(100 * bias.longer_wins, color=REJECTED, linewidth=1, linestyle="--", label='"longer wins"')
    axes.set_xticks(range(3), names)
    axes.set_xlim(-0.5, 2.5)
    axes.set_xlabel(f"length in {bias.unit} (pairs)")
    axes.set_ylabel("accuracy, %")
    axes.legend()


def _dots(axes: Axes, rows: Sequence[tuple[str, Accuracy]]) -> None:
    for place, (_, found) in enumerate(reversed(rows)):
        accuracy_dot(axes, place, found, upright=False)
    axes.axvline(50, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [short_name(name) for name, _ in reversed(rows)], parse_math=False)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("accuracy, %")
