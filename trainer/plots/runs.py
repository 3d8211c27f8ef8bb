"""Figures of several runs on the same axes.

Shapes: R runs, S logged steps, K parts of t, D blocks, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ...pipeline.style import FAINT, INK, Figure, clean, layer_ticks
from .routing import mark_uniform, weight_colours
from .training import log_scale, smoothed

CURVES = {
    "loss": "training loss",
    "validation_loss": "loss on held-out samples",
    "routing_entropy": "entropy of routing weights",
}
"""Columns of metrics -> what they are called."""


def curves_of_runs(metrics: Sequence[pa.Table], names: Sequence[str]) -> Figure:
    """A panel each of loss (smoothed), loss on held-out samples and entropy, by step; a line a run.

    Without the loss on held-out samples where no run has it.
    """
    shown = [
        column
        for column in CURVES
        if any(table[column].null_count < table.num_rows for table in metrics)
    ]
    figure = Figure(figsize=(4.2 * len(shown), 3.6 + 0.1 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, column in zip(panels, shown, strict=True):
        values = []
        for table, name, colour in zip(metrics, names, _line_colours(len(names)), strict=True):
            some = table.filter(pc.is_valid(table[column]))
            if not some.num_rows:
                continue
            step, value = some["step"].to_numpy(), some[column].to_numpy()
            if column == "loss":
                value = smoothed(value, len(value) // 40)
            axes.plot(step, value, color=colour, linewidth=1.4, label=name)
            values.append(value)
        if column != "routing_entropy":
            log_scale(axes, np.concatenate(values))
        _label(axes, "step", CURVES[column])
    _legend(figure, panels[0])
    return figure


def loss_by_t(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Run -> loss in K equal parts of t, from 0 to 1; a line a run."""
    figure = Figure(figsize=(6.4, 3.6 + 0.1 * len(losses)), layout="constrained")
    axes = figure.add_subplot()
    for (name, of_run), colour in zip(losses.items(), _line_colours(len(losses)), strict=True):
        middles = (np.arange(len(of_run)) + 0.5) / len(of_run)
        axes.plot(middles, of_run, "o-", color=colour, linewidth=1.4, markersize=3, label=name)
    log_scale(axes, np.concatenate([*map(np.asarray, losses.values())]))
    axes.set_xlim(0, 1)
    _label(axes, "t   (0 = image, 1 = noise)", "loss on held-out samples")
    _legend(figure, axes)
    return figure


def routing_of_runs(
    weights: Mapping[str, tuple[NDArray[np.floating[Any]], Sequence[int]]],
) -> Figure:
    """Run -> weights alpha [D, L] and their layers; a panel a run, all on one colour scale: that of
    the runs that mix layers."""
    columns = min(3, len(weights))
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.0 + 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    # A run that reads single layers would leave all others dark.
    mixed = [alpha for alpha, _ in weights.values() if alpha.max() < 1]
    flat = np.concatenate([alpha.ravel() for alpha in mixed or [np.ones(1)]])
    fewest = min(len(layers) for _, layers in weights.values())
    colours = weight_colours(np.broadcast_to(flat[:, None], (len(flat), fewest)))
    for axes in panels.flat[len(weights) :]:
        axes.set_visible(False)
    for axes, (name, (alpha, layers)) in zip(panels.flat, weights.items(), strict=False):
        drawn = axes.imshow(alpha, aspect="auto", **colours)
        axes.set_title(name, fontsize=9, color=INK)
        layer_ticks(axes.xaxis, layers, most=8)
        places = range(0, len(alpha), -(-len(alpha) // 6))
        axes.set_yticks(places, [str(place + 1) for place in places])
        axes.tick_params(colors=INK, labelsize=8)
    figure.supxlabel("LLM layer", color=INK, fontsize=10)
    figure.supylabel("DiT block", color=INK, fontsize=10)
    mark_uniform(figure.colorbar(drawn, ax=panels, pad=0.02), fewest)
    return figure


def _line_colours(num: int) -> Any:
    """As many as there are runs, told apart."""
    if num <= 10:
        return colormaps["tab10"](np.arange(num))
    return colormaps["turbo"](np.linspace(0.05, 0.95, num))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.3, linewidth=0.6)
    clean(axes)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
