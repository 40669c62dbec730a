"""Plots as SVG in the colors of the page around them, light or dark; in light ones where there is no page."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from etils import epy

with epy.lazy_imports():
    from matplotlib import figure as figure_module
    from matplotlib import style

INK = "#00000"  # and a digit: stands for that ink of the page, which is another in the dark; 0, black, is matplotlib's default
INKS = {0: "#1f2328", 1: "#0067a5", 2: "#00805e", 3: "#c2410c", 4: "#7c3aed", 5: "#79066a", 9: "#e3e6ea"}  # on a light page
# Of each line: marker, its size, dashes. So a line is known without its color, and those that agree lie on each other and stay visible:
# hollow markers nest, and the last, a cross, reaches beyond all of them.
STYLES: tuple[tuple[str, int, Any], ...] = (("s", 9, "-"), ("^", 7, "-"), ("o", 5, "-"), ("D", 3, (0, (6, 2))), ("x", 11, (0, (1.5, 1.5))))
Figure = Any  # matplotlib's, which is imported when something is drawn


def to_svg(draw: Callable[[Figure], None]) -> str:
    """What `draw` draws into an empty figure: the same text whenever it draws the same."""
    options = {
        "svg.hashsalt": "resmem_lm",  # ids that stay the same
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": f"{INK}9",
    }
    image = io.StringIO()
    with style.context(["default", options]):  # "default", because a user's matplotlibrc must not show in the page
        figure = figure_module.Figure(figsize=(10, 3.8), layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(image, format="svg", transparent=True, metadata=metadata)
    svg = image.getvalue()
    return re.sub(rf"{INK}(\d)", lambda ink: f"var(--ink-{ink[1]}, {INKS[int(ink[1])]})", svg[svg.index("<svg") :])


def line(axes: Any, number: int, x: Sequence[int | float], y: Sequence[int | float], label: str) -> None:
    """A line in ink `number` + 1 and its style, up to five in a plot."""
    marker, size, dashes = STYLES[number]
    axes.plot(
        x,
        y,
        color=f"{INK}{number + 1}",
        marker=marker,
        markersize=size,
        markerfacecolor="none",
        linestyle=dashes,
        linewidth=1.5,
        label=label,
    )
