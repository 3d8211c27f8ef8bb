"""Figures of routing weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ...pipeline.style import (
    COLOUR_MAP,
    FAINT,
    INK,
    LINES,
    SIGNED_COLOUR_MAP,
    Figure,
    clean,
    layer_ticks,
)
from ...schemas import InputError


def routing_heatmap(
    weights: NDArray[np.floating[Any]], layers: Sequence[int], title: str = "Routing weights"
) -> Figure:
    """Which layers each block reads: weights alpha [D, L], above them their mean over the blocks.

    The weight that every layer has under ``uniform``, 1/L, is marked in the mean and on the colour
    bar. Where every block reads the same mix only that is drawn. Weights of both signs have colours
    that part at zero.

    Raises:
        InputError: weights that are not [D, len(layers)].
    """
    weights = _checked(weights, ("D", "L"), layers)
    weights = weights[:1] if (weights == weights[:1]).all() else weights
    num_blocks, num_layers = weights.shape
    single = num_blocks == 1
    width = max(6.0, 2.2 + 0.2 * num_layers)
    height = 1.2 + 0.2 * num_blocks
    figure = Figure(figsize=(width, 2.6 if single else 2.4 + height), layout="constrained")
    figure.suptitle(title, color=INK)
    if single:
        top = figure.add_subplot()
    else:
        top, main = figure.subplots(2, 1, sharex=True, height_ratios=(1.0, height))
        drawn = main.imshow(weights, aspect="auto", **weight_colours(weights))
        _block_ticks(main, num_blocks)
        mark_uniform(figure.colorbar(drawn, ax=main, pad=0.02), num_layers)
    top.bar(range(num_layers), weights.mean(0), width=0.8, color=LINES[0])
    top.axhline(1 / num_layers, color=INK, linewidth=1, linestyle="--")
    word = top.annotate(
        "uniform",
        (1, 1 / num_layers),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=8,
    )
    word.set_in_layout(single)  # else the colour bar would make room for it
    top.set_ylabel("weight" if single else "mean", color=INK)
    if weights.min() >= 0:
        top.set_ylim(bottom=0)
    else:
        top.axhline(0, color=FAINT, linewidth=0.6)
    top.set_xlim(-0.5, num_layers - 0.5)
    clean(top)
    bottom = top if single else main
    layer_ticks(bottom.xaxis, layers)
    bottom.set_xlabel("LLM layer", color=INK)
    return figure


def routing_over_time(
    weights: NDArray[np.floating[Any]],
    t: NDArray[np.floating[Any]],
    layers: Sequence[int],
    title: str = "Routing weights over the noise level",
) -> Figure:
    """How the mix changes with the noise level: weights alpha [T, D, L] at ascending t [T].

    A panel a block, all on one colour scale; one panel where every block reads the same mix.

    Raises:
        InputError: weights that are not [T, D, len(layers)], or t that does not ascend.
    """
    weights = _checked(weights, ("T", "D", "L"), layers)
    t = np.asarray(t, np.float64)
    if t.shape != weights.shape[:1] or len(t) < 2 or (np.diff(t) <= 0).any():
        raise InputError(
            f"found t of shape {list(t.shape)} for {len(weights)} rows of weights, expected as "
            "many, at least two, ascending"
        )
    figure = _block_panels(weights, t, layers, along_x=False)
    figure.suptitle(title, color=INK)
    figure.supxlabel("LLM layer", color=INK, fontsize=10)
    figure.supylabel("t   (0 = image, 1 = noise)", color=INK, fontsize=10)
    return figure


def routing_over_steps(
    weights: NDArray[np.floating[Any]],
    steps: NDArray[np.integer[Any]],
    layers: Sequence[int],
    title: str = "Routing weights over the steps",
) -> Figure:
    """How the mix was learned: weights alpha [S, D, L] after ascending steps [S].

    A panel a block, all on one colour scale; one panel where every block reads the same mix.

    Raises:
        InputError: weights that are not [S, D, len(layers)], or fewer than two steps.
    """
    weights = _checked(weights, ("S", "D", "L"), layers)
    places = np.asarray(steps, np.float64)
    if places.shape != weights.shape[:1] or len(places) < 2 or (np.diff(places) <= 0).any():
        raise InputError(
            f"found steps of shape {list(places.shape)} for {len(weights)} rows of weights, "
            "expected as many, at least two, ascending"
        )
    figure = _block_panels(weights, places, layers, along_x=True)
    figure.suptitle(title, color=INK)
    figure.supxlabel("step", color=INK, fontsize=10)
    figure.supylabel("LLM layer", color=INK, fontsize=10)
    return figure


def _block_panels(
    weights: NDArray[np.floating[Any]],
    places: NDArray[np.floating[Any]],
    layers: Sequence[int],
    *,
    along_x: bool,
) -> Figure:
    """Weights [P, D, L] at ascending places, a panel a block: layers along x, or places."""
    if (weights == weights[:, :1]).all():
        weights = weights[:, :1]
    num_blocks, num_layers = weights.shape[1:]
    columns = min(num_blocks, 4 if num_blocks != 6 else 3)
    rows = -(-num_blocks // columns)
    size = (6.5, 4.0) if num_blocks == 1 else (1.2 + 2.6 * columns, 1.2 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    edges = np.concatenate([places[:1], (places[1:] + places[:-1]) / 2, places[-1:]])
    of_layers = np.arange(num_layers + 1) - 0.5
    for block, axes in enumerate(panels.flat):
        if block >= num_blocks:
            axes.set_visible(False)
            continue
        grid = weights[:, block].T if along_x else weights[:, block]
        sides = (edges, of_layers) if along_x else (of_layers, edges)
        drawn = axes.pcolormesh(*sides, grid, rasterized=True, **weight_colours(weights))
        if num_blocks > 1:
            axes.set_title(f"block {block + 1}", fontsize=9, color=INK)
        axis = axes.yaxis if along_x else axes.xaxis
        layer_ticks(axis, layers, most=12 if num_blocks == 1 else 6)
        axes.tick_params(colors=INK, labelsize=8)
    mark_uniform(figure.colorbar(drawn, ax=panels, pad=0.02, aspect=10 + 10 * rows), num_layers)
    return figure


def _checked(
    weights: NDArray[np.floating[Any]], axes: tuple[str, ...], layers: Sequence[int]
) -> NDArray[np.floating[Any]]:
    weights = np.asarray(weights)
    if weights.ndim != len(axes) or weights.shape[-1] != len(layers) or not weights.size:
        raise InputError(
            f"found weights of shape {list(weights.shape)} for {len(layers)} layers, expected "
            f"[{', '.join(axes)}] with L = {len(layers)}"
        )
    return weights


def _block_ticks(axes: Axes, num_blocks: int) -> None:
    step = -(-num_blocks // 12)
    places = range(0, num_blocks, step)
    axes.set_yticks(places, [str(place + 1) for place in places])
    axes.set_ylabel("DiT block", color=INK)


def weight_colours(weights: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Colour map and limits: to twice uniform at least, so that noise around uniform does not look
    like routing."""
    limit = max(float(np.abs(weights).max()), 2 / weights.shape[-1])
    if weights.min() >= 0:
        return {"cmap": COLOUR_MAP, "vmin": 0, "vmax": limit}
    return {"cmap": SIGNED_COLOUR_MAP, "vmin": -limit, "vmax": limit}


def mark_uniform(bar: Any, num_layers: int) -> None:
    """A line and a word at 1/L on a colour bar."""
    bar.outline.set_visible(False)
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
