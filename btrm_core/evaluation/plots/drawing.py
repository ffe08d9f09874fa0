"""How a picture is drawn: one style, a PNG on disk, and an SVG that follows the colours of its page.

Decides: what axes, dots and names look like everywhere; that text stays text in the SVG and colours become CSS
variables, so that one drawing is right on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btrm_core.errors import ConfigError
from btrm_core.evaluation.statistics import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, CHOSEN, REJECTED, ACCENT = "#1c2430", "#5d6775", "#d9dee5", "#2563a8", "#c2571a", "#6b4fa0"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", CHOSEN: "chosen", REJECTED: "rejected", ACCENT: "accent"}
_WIDTH, _HEIGHT = 4.8, 3.1
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.7,
}
_LONGEST_NAME = 22


@dataclass(frozen=True)
class Plot:
    """A finished picture.

    Attributes:
        name: its file name without ending, also the beginning of all ids in the SVG.
        caption: what it shows, in one sentence.
        svg: the picture as a part of a page.
    """

    name: str
    caption: str
    svg: str


def require_matplotlib() -> None:
    """Raise a ConfigError that says what to install, if matplotlib is missing.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report needs matplotlib, which is not installed: pip install 'btrm[report]'") from error


def draw(name: str, caption: str, paint: Callable[[Axes], None], directory: Path, height: float = _HEIGHT) -> Plot:
    """Draw one picture, write `directory/name.png` and return it as SVG.

    Args:
        name: its file name without ending; no two pictures of a page may share one.
        caption: what it shows, in one sentence.
        paint: draws on the axes that it is given.
        directory: where the PNG is written; must exist.
        height: of the picture, in inches.

    Raises:
        OSError: the PNG cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no state that plots of a program would share

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(directory / f"{name}.png", dpi=150, facecolor="white")
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, caption, themed(out.getvalue(), name, caption))


def themed(svg: str, name: str, caption: str) -> str:
    """Matplotlib's SVG as a part of a page: own ids, colours as variables of the page, a name for screen readers.

    Args:
        svg: the SVG with its prologue, drawn in the colours of this module.
        name: put before every id, so that two pictures of a page share none.
        caption: the name for screen readers.

    Returns:
        One `svg` element.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = rf'<svg role="img" aria-label="{label}" viewBox="\1">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)


def edges_of(values: np.ndarray) -> list[float]:
    """About 40 bins at most, with an edge at 0, over all values but the outermost 2 in 1,000 on each side.

    Args:
        values: what is to be counted, at least one; NaN is not allowed.

    Returns:
        The edges of bins of one width, ascending.
    """
    low, high = (float(q) for q in np.quantile(values, [0.002, 0.998]))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / min(40, max(8, int(np.sqrt(values.size))))
    return [float(edge) for edge in np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width]


def accuracy_dot(axes: Axes, place: int, found: Accuracy, *, upright: bool) -> None:
    """Draw an accuracy in per cent as a dot on the line of its 95 % interval.

    Args:
        axes: what is drawn on.
        place: where, on the axis that names what the accuracies are of.
        found: the accuracy.
        upright: True if accuracy goes up, False if it goes to the right.
    """
    ends = [100 * found.interval.low, 100 * found.interval.high]
    line, dot = ([place, place], ends), ([place], [100 * found.half])
    for (x, y), marker in ((line, "-"), (dot, "o")):
        axes.plot(*((x, y) if upright else (y, x)), marker, color=CHOSEN, markersize=6)


def height_of(rows: int) -> float:
    """Height of a picture with so many rows, in inches.

    Args:
        rows: how many rows of dots it has.
    """
    return max(1.6, 0.85 + 0.29 * rows)


def short_name(name: str) -> str:
    """A name that fits beside an axis, on one line.

    Args:
        name: any text.

    Returns:
        The name, or its first 21 characters and an ellipsis.
    """
    name = " ".join(name.encode("utf-8", "replace").decode("utf-8").split())
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
