"""Loss and validation curves."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ...pipeline.style import COLOUR_MAP, FAINT, INK, LINES, Figure, clean
from ...schemas import InputError


def loss_curve(metrics: pa.Table, title: str = "Training loss") -> Figure:
    """The loss by step, as logged and smoothed, from columns ``step`` and ``loss``.

    Smoothed by a centred mean over a twentieth of the rows, or as many as there are.

    Raises:
        InputError: no rows.
    """
    if not metrics.num_rows:
        raise InputError(
            "the metrics hold no rows, expected at least one: train for log_every steps"
        )
    step, loss = (metrics.column(name).to_numpy() for name in ("step", "loss"))
    half = len(loss) // 40
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    smooth = smoothed(loss, half)
    axes.plot(step, loss, color=LINES[0], alpha=0.3, linewidth=0.8, label="logged")
    if half:
        axes.plot(step, smooth, color=LINES[0], linewidth=2, label=f"mean of {2 * half + 1}")
        axes.legend(frameon=False, labelcolor=INK)
    log_scale(axes, loss)
    axes.set_title(title, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.3, linewidth=0.6)
    clean(axes)
    return figure


def validation_curves(metrics: pa.Table, title: str = "Loss on held-out samples") -> Figure:
    """The loss of each part of t by step, noisier ones lighter, and their mean; from columns
    ``step``, ``validation_loss`` and ``validation_by_t``, where these are not null.

    Raises:
        InputError: it was never measured.
    """
    measured = metrics.filter(pc.is_valid(metrics["validation_loss"]))
    if not measured.num_rows:
        raise InputError("the metrics hold no validation: train with validation.share")
    step, mean = (measured[name].to_numpy() for name in ("step", "validation_loss"))
    by_t = np.array(measured["validation_by_t"].to_pylist())  # [S, K]
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    num = by_t.shape[1]
    colours = colormaps[COLOUR_MAP](np.linspace(0.15, 0.85, num))
    for number in range(num - 1, -1, -1):
        label = f"t {number / num:.3g} to {(number + 1) / num:.3g}"
        dot = "." if len(step) == 1 else None
        axes.plot(
            step, by_t[:, number], color=colours[number], linewidth=1, marker=dot, label=label
        )
    axes.plot(step, mean, color=INK, linewidth=2, marker=dot, label="mean")
    log_scale(axes, by_t)
    axes.set_title(title, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss", color=INK)
    axes.grid(axis="y", which="both", color=FAINT, alpha=0.3, linewidth=0.6)
    clean(axes)
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK, fontsize=8)
    return figure


def log_scale(axes: Axes, values: NDArray[np.floating[Any]]) -> None:
    """A logarithmic axis where values fall far, with numbers that are read as numbers."""
    if values.min() <= 0 or values.max() <= 5 * values.min():
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""
    )


def smoothed(values: NDArray[np.floating[Any]], half: int) -> NDArray[np.floating[Any]]:
    """Mean over ``half`` neighbours on either side: fewer where the values end, and as few after as
    before where they begin, for there a loss falls too steeply to look ahead."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start = np.maximum(index - half, 0)
    stop = np.minimum(index + np.minimum(half, index), len(values) - 1) + 1
    return (total[stop] - total[start]) / (stop - start)
