"""The figures of a run.

Shapes: T noise levels, D blocks, L layers, S logged steps.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...pipeline.style import DPI
from ..plots.routing import routing_heatmap, routing_over_steps, routing_over_time
from ..plots.scores import accuracy_bars
from ..plots.training import loss_curve, validation_curves
from .scores import EvaluationReport

if TYPE_CHECKING:
    from ...pipeline.style import Figure
    from .run import Run

NUM_T = 65
"""Noise levels at which figures show weights that depend on t."""


def plot_run(run: "Run", out: str | Path) -> list[Path]:
    """Write the figures of a run as PNG into the folder ``out``.

    Returns:
        Their paths, in the order written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures = make_figures(run)
    paths = [out / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def make_figures(run: "Run") -> "dict[str, Figure]":
    """Name -> figure; see :meth:`.run.Run.figures`."""
    return {**_training(run), **_routing(run), **_scores(run)}


def _training(run: "Run") -> "dict[str, Figure]":
    metrics, strategy = run.metrics(), run.record.config.routing.strategy
    figures = {}
    if metrics.num_rows:
        figures["loss"] = loss_curve(metrics, f"Training loss, {strategy}")
    if metrics["validation_loss"].null_count < metrics.num_rows:
        title = f"Loss on held-out samples, {strategy}"
        figures["validation"] = validation_curves(metrics, title)
    return figures


def _routing(run: "Run") -> "dict[str, Figure]":
    strategy, figures = run.record.config.routing.strategy, {}
    title = f"Routing weights, {strategy}"
    if run.model.router.depends_on_t:
        t = np.linspace(0, 1, NUM_T)
        weights = run.weights(t)  # [T, D, L]
        mean = f"{title}, mean over t"
        figures["routing"] = routing_heatmap(weights.mean(0), run.layers, mean)
        over = f"Routing weights over the noise level, {strategy}"
        figures["routing-over-time"] = routing_over_time(weights, t, run.layers, over)
    else:
        figures["routing"] = routing_heatmap(run.weights()[0], run.layers, title)
    steps, _, weights = run.history()  # [S, T, D, L]
    if len(steps) > 1:
        over = f"Routing weights over the steps, {strategy}"
        figures["routing-over-steps"] = routing_over_steps(weights.mean(1), steps, run.layers, over)
    return figures


def _scores(run: "Run") -> "dict[str, Figure]":
    report = EvaluationReport.read(run.path)
    if report is None:
        return {}
    about = f"{run.record.config.routing.strategy}, step {report.step:,}"
    return {
        f"accuracy-cfg-{cfg_scale:g}": accuracy_bars(
            evaluation.table, f"Accuracy by skill, {about}, guidance {cfg_scale:g}"
        )
        for cfg_scale, evaluation in report.scores.items()
    }
