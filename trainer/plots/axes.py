"""Parts of axes that several figures share: labels, scales, colours of weights, legends."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...pipeline.style import COLOUR_MAP, FAINT, INK, SIGNED_COLOUR_MAP, Figure, clean, log_axis


def label(axes: Axes, x: str, y: str, title: str | None = None) -> None:
    """Names of both axes, faint horizontal lines, and a title above."""
    if title is not None:
        axes.set_title(title, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.3, linewidth=0.6)
    clean(axes)


def block_ticks(axes: Axes, num_blocks: int, most: int = 12) -> None:
    """DiT blocks along the y axis, counted from 1; not every one where there are many."""
    shown = range(0, num_blocks, -(-num_blocks // most))
    axes.set_yticks(shown, [str(block + 1) for block in shown])


def log_scale(axes: Axes, values: NDArray[np.floating[Any]]) -> None:
    """A logarithmic y axis where values fall by more than a factor of 5, with plain numbers."""
    if values.min() > 0 and values.max() > 5 * values.min():
        log_axis(axes)


def smoothed(values: NDArray[np.floating[Any]], half: int) -> NDArray[np.floating[Any]]:
    """Mean over ``half`` neighbours on either side; fewer at the end, and at the start as few after
    as before, since a loss falls too steeply there to look ahead."""
    # With half = 2 and 6 values:
    #
    #     index    0  1  2  3  4  5
    #     start    0  0  0  1  2  3
    #     stop     1  3  5  6  6  6     values start to stop are averaged
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start = np.maximum(index - half, 0)
    stop = np.minimum(index + np.minimum(half, index), len(values) - 1) + 1
    return (total[stop] - total[start]) / (stop - start)


def line_colours(num: int) -> Any:
    """As many distinct colours."""
    if num <= 10:
        return colormaps["tab10"](np.arange(num))
    return colormaps["turbo"](np.linspace(0.05, 0.95, num))


def weight_colours(weights: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Colour map and limits of weights: at least up to twice uniform, so that noise around uniform
    does not look like routing."""
    limit = max(float(np.abs(weights).max()), 2 / weights.shape[-1])
    if weights.min() >= 0:
        return {"cmap": COLOUR_MAP, "vmin": 0, "vmax": limit}
    return {"cmap": SIGNED_COLOUR_MAP, "vmin": -limit, "vmax": limit}


def mark_uniform(bar: Any, num_layers: int) -> None:
    """A line at 1/L on a colour bar, named uniform."""
    bar.outline.set_visible(False)
    bar.set_label("weight", color=INK, fontsize=8)
    bar.ax.axhline(1 / num_layers, color="white", linewidth=1.5)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.annotate(
        "uniform",
        (0, 1 / num_layers),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        rotation=90,
        fontsize=7,
        color=INK,
    )


def legend_below(
    figure: Figure,
    handles: Sequence[Any],
    labels: Sequence[str],
    *,
    columns: int,
    fontsize: float | None = None,
) -> None:
    """A legend without a frame, below all axes."""
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=fontsize,
    )
