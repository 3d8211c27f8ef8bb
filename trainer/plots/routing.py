"""Figures of routing weights.

Shapes: D blocks, L layers, T noise levels, S logged steps, P points (of t or steps).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.style import FAINT, INK, LINES, Figure, clean, layer_ticks
from ...schemas import InputError
from .axes import block_ticks, mark_uniform, weight_colours


def routing_heatmap(
    weights: NDArray[np.floating[Any]],
    layers: Sequence[int],
    title: str = "Routing weights",
    rows: str = "DiT block",
) -> Figure:
    """The layers that each block reads: weights alpha [D, L], and above them the mean over blocks.

    The weight that every layer has under ``uniform``, 1/L, is marked in the mean and on the colour
    bar. Where every block reads the same mix, the figure shows only that. Weights of both signs
    have a colour map that is white at zero.

    Args:
        rows: what each row of the weights is for.

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
        mesh = main.imshow(weights, aspect="auto", **weight_colours(weights))
        block_ticks(main, num_blocks)
        main.set_ylabel(rows, color=INK)
        mark_uniform(figure.colorbar(mesh, ax=main, pad=0.02), num_layers)
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
    top.set_ylabel("weight" if single else "mean weight", color=INK)
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
    """The mix over the noise level: weights alpha [T, D, L] at ascending t [T].

    One panel per block, all on one colour scale; a single panel where all blocks read the same mix.

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
    """The mix over training: weights alpha [S, D, L] after ascending steps [S].

    One panel per block, all on one colour scale; a single panel where all blocks read the same mix.

    Raises:
        InputError: weights that are not [S, D, len(layers)], or fewer than two steps.
    """
    weights = _checked(weights, ("S", "D", "L"), layers)
    points = np.asarray(steps, np.float64)
    if points.shape != weights.shape[:1] or len(points) < 2 or (np.diff(points) <= 0).any():
        raise InputError(
            f"found steps of shape {list(points.shape)} for {len(weights)} rows of weights, "
            "expected as many, at least two, ascending"
        )
    figure = _block_panels(weights, points, layers, along_x=True)
    figure.suptitle(title, color=INK)
    figure.supxlabel("step", color=INK, fontsize=10)
    figure.supylabel("LLM layer", color=INK, fontsize=10)
    return figure


def _block_panels(
    weights: NDArray[np.floating[Any]],
    points: NDArray[np.floating[Any]],
    layers: Sequence[int],
    *,
    along_x: bool,
) -> Figure:
    """Weights [P, D, L] at ascending points, one panel per block.

    Args:
        along_x: points along x and layers along y; otherwise the other way round.
    """
    if (weights == weights[:, :1]).all():
        weights = weights[:, :1]
    num_blocks, num_layers = weights.shape[1:]
    columns = min(num_blocks, 4 if num_blocks != 6 else 3)
    rows = -(-num_blocks // columns)
    size = (6.5, 4.0) if num_blocks == 1 else (1.2 + 2.6 * columns, 1.2 + 1.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    # Cells end halfway between points: points 0, 100, 300 have edges 0, 50, 200, 300.
    edges = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    layer_edges = np.arange(num_layers + 1) - 0.5
    for block, axes in enumerate(panels.flat):
        if block >= num_blocks:
            axes.set_visible(False)
            continue
        grid = weights[:, block].T if along_x else weights[:, block]
        sides = (edges, layer_edges) if along_x else (layer_edges, edges)
        mesh = axes.pcolormesh(*sides, grid, rasterized=True, **weight_colours(weights))
        if num_blocks > 1:
            axes.set_title(f"block {block + 1}", fontsize=9, color=INK)
        axis = axes.yaxis if along_x else axes.xaxis
        layer_ticks(axis, layers, most=12 if num_blocks == 1 else 6)
        axes.tick_params(colors=INK, labelsize=8)
    mark_uniform(figure.colorbar(mesh, ax=panels, pad=0.02, aspect=10 + 10 * rows), num_layers)
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
