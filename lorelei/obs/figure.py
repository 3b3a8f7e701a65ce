"""Figures: the style that all plots of a run share. matplotlib loads inside the functions.

Shapes: N points of one curve.
"""
# pyright: reportUnknownMemberType=false
# matplotlib's methods take **kwargs without types

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, safe for colour-blind readers; their yellow is too light for lines and
# a dark wine red stands in for it.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#882255",
)  # fmt: skip
# Of parts of one whole, from dark to light: no hue, so that none is taken for an adapter's.
SHADES = ("#3F4B5B", "#73849B", "#A9B5C5", "#D0D7E0", "#E9E3D8", "#C9B99A")
Label = tuple[float, str, str, str]  # y, text, colour, weight
INK = "#222222"
GREY = "#777777"
DPI = 100

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": "#bbbbbb",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#ececec",
    "xtick.color": "#bbbbbb",
    "ytick.color": "#bbbbbb",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@contextmanager
def new_figure(width: int, height: int, out: Path) -> Generator[Figure]:
    """A figure of width x height pixels, written to `out` as PNG when the block ends well."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    with matplotlib.rc_context(style):
        # Not pyplot, which keeps figures alive and may look for a display: this one draws with Agg.
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        yield figure
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.part")
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, out)


def titles(figure: Figure, title: str, subtitle: str) -> None:
    """A bold line and a grey one at the top left, 22 and 44 pixels from the edge."""
    height = figure.get_figheight() * DPI
    left = 24 / (figure.get_figwidth() * DPI)
    both: dict[str, Any] = {"va": "top", "parse_math": False}
    figure.text(left, 1 - 14 / height, title, fontsize=15, fontweight="bold", **both)
    figure.text(left, 1 - 42 / height, subtitle, fontsize=10.5, color=GREY, **both)


def smoothed(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a tenth of the points, the window shrinking at the ends. [N]"""
    half = max(1, len(values_N) // 20)
    spans = (values_N[max(0, i - half) : i + half + 1] for i in range(len(values_N)))
    return np.array([span.mean() for span in spans])


def fit_y(axes: Axes, values: Sequence[float], at_least: float) -> None:
    """Limits of y around the values, never closer than `at_least`; scores stay within 0 to 1."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (at_least - (high - low)) / 2, 1e-9)
    inside = low >= 0 and high <= 1
    bottom, top = low - pad, high + pad
    axes.set_ylim(max(bottom, -0.02) if inside else bottom, min(top, 1.03) if inside else top)


def whole_steps(axes: Axes, last: float | None = None) -> None:
    """Ticks of x at whole steps only, and none beyond the last step."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(
        MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    if last is not None:
        low, high = axes.get_xlim()
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= last])
        axes.set_xlim(low, high)


def room_x(axes: Axes, begin: float, end: float, letters: int) -> None:
    """Limits of x that leave room for labels: four digits at the left, `letters` at the right."""
    width = axes.get_window_extent().width
    left, right = 56.0, 14 + 8.8 * letters  # pixels; bold text of this size needs 8.8 a letter
    pixel = max(end - begin, 1) / max(width - left - right, 0.3 * width)
    axes.set_xlim(begin - left * pixel, end + right * pixel)
    whole_steps(axes, last=end)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart and nearest to the wanted ones, in the given order.

    The least-squares answer: without the gaps it is isotonic regression, done by pooling.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            upper = pools.pop()
            pools[-1] += upper
    placed = [float(np.mean(pool)) for pool in pools for _ in pool]
    limit = high - (len(wanted) - 1) * gap
    found = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        found[i] = max(low, min(placed[rank], limit)) + rank * gap
    assert all(found[b] - found[a] > 0.999 * gap for a, b in pairwise(order))
    return found


def label_ends(
    axes: Axes, x: float, labels: Sequence[Label], side: Literal["left", "right"]
) -> None:
    """Write the labels beside x on the left or right, none over another.

    The limits of y must be final.
    """
    from matplotlib.patheffects import withStroke

    bottom, top = axes.get_ylim()
    height = axes.get_window_extent().height
    pixels = min(16.0, height / (len(labels) + 1))  # a line of this font needs 16
    gap = pixels * (top - bottom) / height
    for y, (_, text, colour, weight) in zip(
        spread([label[0] for label in labels], gap, bottom + gap / 2, top), labels, strict=True
    ):
        axes.annotate(
            text,
            (x, y),
            xytext=(9 if side == "right" else -9, 0),
            textcoords="offset points",
            ha="left" if side == "right" else "right",
            va="center",
            color=colour,
            fontsize=10.5 * pixels / 16,
            fontweight=weight,
            annotation_clip=False,
            parse_math=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # over grid lines
        )
