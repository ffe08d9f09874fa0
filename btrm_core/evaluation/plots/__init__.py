"""The pictures of a report: drawn once, written as PNG, and put into the page as SVG."""

from btrm_core.evaluation.plots.drawing import Plot, require_matplotlib
from btrm_core.evaluation.plots.pictures import (
    plot_of_comparison,
    plot_of_models,
    plot_of_training,
    plots_of,
    plots_of_lengths,
)

__all__ = [
    "Plot",
    "plot_of_comparison",
    "plot_of_models",
    "plot_of_training",
    "plots_of",
    "plots_of_lengths",
    "require_matplotlib",
]
