"""Loss and validation curves.

Shapes: S logged steps, K parts of t.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps

from ...pipeline.style import COLOUR_MAP, INK, LINES, Figure
from ...schemas import InputError
from .axes import label, log_scale, smoothed


def loss_curve(metrics: pa.Table, title: str = "Training loss") -> Figure:
    """The loss by step, as logged and smoothed, from columns ``step`` and ``loss``.

    Smoothed by a centred mean over a twentieth of the rows, fewer at both ends.

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
    label(axes, "step", "loss", title)
    return figure


def validation_curves(metrics: pa.Table, title: str = "Loss on held-out samples") -> Figure:
    """The loss per part of t by step, noisier parts lighter, and their mean; from columns ``step``,
    ``validation_loss`` and ``validation_by_t``, where these are not null.

    Raises:
        InputError: the loss was never measured.
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
        part = f"t {number / num:.3g} to {(number + 1) / num:.3g}"
        dot = "." if len(step) == 1 else None
        axes.plot(step, by_t[:, number], color=colours[number], linewidth=1, marker=dot, label=part)
    axes.plot(step, mean, color=INK, linewidth=2, marker=dot, label="mean")
    log_scale(axes, by_t)
    label(axes, "step", "loss", title)
    figure.legend(loc="outside right center", frameon=False, labelcolor=INK, fontsize=8)
    return figure
