"""Draw plots as SVG in the light or dark colors of their page. Outside of a page they are light."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from etils import epy

with epy.lazy_imports():
    from matplotlib import figure as figure_module
    from matplotlib import style

INK = "#00000"  # INK and a digit stands for that ink of the page; ink 0 (black) is matplotlib's default
INKS = {0: "#1f2328", 1: "#0067a5", 2: "#00805e", 3: "#c2410c", 4: "#7c3aed", 5: "#79066a", 9: "#e3e6ea"}  # on a light page
# Marker, marker size and dashes of each line, which identify it without its color. Lines with equal values stay visible: hollow markers
# fit inside one another, and the cross is the largest.
STYLES: tuple[tuple[str, int, Any], ...] = (("s", 9, "-"), ("^", 7, "-"), ("o", 5, "-"), ("D", 3, (0, (6, 2))), ("x", 11, (0, (1.5, 1.5))))
Figure = Any  # a matplotlib figure


def to_svg(draw: Callable[[Figure], None]) -> str:
    """Return the SVG of a figure that `draw` fills. Equal drawings give equal text."""
    options = {
        "svg.hashsalt": "resmem_lm",  # stable ids
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": f"{INK}9",
    }
    image = io.StringIO()
    with style.context(["default", options]):  # "default": a user's matplotlibrc must not change the page
        figure = figure_module.Figure(figsize=(10, 3.8), layout="constrained")
        draw(figure)
        metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(image, format="svg", transparent=True, metadata=metadata)
    svg = image.getvalue()
    return re.sub(rf"{INK}(\d)", lambda ink: f"var(--ink-{ink[1]}, {INKS[int(ink[1])]})", svg[svg.index("<svg") :])


def line(axes: Any, number: int, x: Sequence[int | float], y: Sequence[int | float], label: str) -> None:
    """Plot line `number`, 0 to 4, in its ink and style."""
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


def legend_above(figure: Figure) -> None:
    """Place one legend above all axes, with the lines of the first axes."""
    handles, labels = figure.get_axes()[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)


def log_ticks(axes: Any, values: Sequence[int | float], label: Callable[[float], str] = "{:g}".format, *, base: int = 2) -> None:
    """Make the x-axis logarithmic, with ticks at the given values only."""
    axes.set_xscale("log", base=base)
    axes.set_xticks(values, [label(value) for value in values])
    axes.minorticks_off()
