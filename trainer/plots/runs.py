"""Figures of several runs on the same axes.

Shapes: R runs, S logged steps, K parts of t, D blocks, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ...pipeline.style import INK, Figure, layer_ticks, plain
from .axes import (
    block_ticks,
    label,
    legend_below,
    line_colours,
    log_scale,
    mark_uniform,
    smoothed,
    weight_colours,
)

CURVES = {
    "loss": "training loss",
    "validation_loss": "loss on held-out samples",
    "routing_entropy": "entropy of routing weights",
}
"""Columns of metrics -> their labels."""


def curves_of_runs(metrics: Sequence[pa.Table], names: Sequence[str]) -> Figure:
    """Panels of loss (smoothed), loss on held-out samples and entropy, by step; one line per run.

    A panel is left out where no run has its numbers.
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
        for table, name, colour in zip(metrics, names, line_colours(len(names)), strict=True):
            some = table.filter(pc.is_valid(table[column]))
            if not some.num_rows:
                continue
            step, value = some["step"].to_numpy(), some[column].to_numpy()
            if column == "loss":
                value = smoothed(value, len(value) // 40)
            axes.plot(step, value, color=colour, linewidth=1.4, label=plain(name))
            values.append(value)
        if column != "routing_entropy":
            log_scale(axes, np.concatenate(values))
        label(axes, "step", CURVES[column])
    _legend(figure, panels[0])
    return figure


def loss_by_t(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Run -> loss in K equal parts of t, from 0 to 1; one line per run."""
    figure = Figure(figsize=(6.4, 3.6 + 0.1 * len(losses)), layout="constrained")
    axes = figure.add_subplot()
    for (name, of_run), colour in zip(losses.items(), line_colours(len(losses)), strict=True):
        middles = (np.arange(len(of_run)) + 0.5) / len(of_run)
        axes.plot(
            middles, of_run, "o-", color=colour, linewidth=1.4, markersize=3, label=plain(name)
        )
    log_scale(axes, np.concatenate([*map(np.asarray, losses.values())]))
    axes.set_xlim(0, 1)
    label(axes, "t   (0 = image, 1 = noise)", "loss on held-out samples")
    _legend(figure, axes)
    return figure


def routing_of_runs(
    weights: Mapping[str, tuple[NDArray[np.floating[Any]], Sequence[int]]],
) -> Figure:
    """Run -> weights alpha [D, L] and their layers; one panel per run, all on one colour scale,
    which is that of the runs that mix layers."""
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
        mesh = axes.imshow(alpha, aspect="auto", **colours)
        axes.set_title(plain(name), fontsize=9, color=INK)
        layer_ticks(axes.xaxis, layers, most=8)
        block_ticks(axes, len(alpha), most=6)
        axes.tick_params(colors=INK, labelsize=8)
    figure.supxlabel("LLM layer", color=INK, fontsize=10)
    figure.supylabel("DiT block", color=INK, fontsize=10)
    mark_uniform(figure.colorbar(mesh, ax=panels, pad=0.02), fewest)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend_below(figure, handles, labels, columns=min(4, len(labels)), fontsize=8)
