"""Figures of a feature store, without global matplotlib state.

Every function returns a matplotlib ``Figure``: a notebook shows it, ``savefig`` writes it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...schemas.columns import numbers
from ..style import (
    COLOUR_MAP,
    FAINT,
    INK,
    LINES,
    Figure,
    clean,
    layer_ticks,
    log_axis,
    plain,
    readable,
)
from .statistics import measure_caption

if TYPE_CHECKING:
    from ...schemas import Routing
    from ..store.features import Caption, FeatureStore
    from .linear_probe import ProbeResults
    from .statistics import LayerStatistics


def norms(statistics: LayerStatistics) -> Figure:
    """L2 norms of hidden states by layer: median, 5 to 95 % and the largest."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    positions = range(len(statistics.layers))
    low, median, high, most = statistics.norms.T
    axes.fill_between(
        positions, low, high, color=LINES[0], alpha=0.25, label="5 to 95 %", linewidth=0
    )
    axes.plot(positions, median, color=LINES[0], marker="o", markersize=3, label="median")
    axes.plot(
        positions, most, color=LINES[1], marker="o", markersize=3, linewidth=1, label="largest"
    )
    log_axis(axes)
    _finish(axes, statistics.layers, "Norm of hidden states", "L2 norm of h")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def massive_activations(statistics: LayerStatistics) -> Figure:
    """The largest channel of a vector over its median one, and the variance in the top three."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    positions = range(len(statistics.layers))
    median, most = statistics.largest.T
    top.plot(positions, median, color=LINES[0], marker="o", markersize=3, label="median token")
    top.plot(positions, most, color=LINES[1], marker="o", markersize=3, label="worst token")
    top.axhline(1000, color=FAINT, linewidth=1, linestyle="--")
    log_axis(top)
    top.set_ylabel("largest over median channel", color=INK, fontsize=8)
    top.legend(frameon=False, fontsize=8, labelcolor=INK)
    clean(top)
    bottom.bar(positions, 100 * statistics.top3_energy, width=0.8, color=LINES[0])
    bottom.set_ylim(0, 100)
    _finish(bottom, statistics.layers, "Massive activations", "% of variance in 3 channels")
    return figure


def similarity(statistics: LayerStatistics) -> Figure:
    """Similarity of every two layers: linear CKA and the cosine of the same token, of LN(h)."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    figure.suptitle("Similarity of layers", color=INK)
    pairs = {"linear CKA": statistics.cka, "cosine of a token": statistics.cosine}
    for axes, (name, values) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
        least = min(0.0, float(np.nanmin(values, initial=0.0)))
        image = axes.imshow(values, COLOUR_MAP, vmin=least, vmax=1, origin="lower")
        layer_ticks(axes.xaxis, statistics.layers, most=8)
        axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
        axes.set_title(name, color=INK, fontsize=9)
        axes.set_xlabel("LLM layer", color=INK)
        axes.set_ylabel("LLM layer", color=INK)
        clean(axes)
        _colour_bar(figure, image, axes, "similarity")
    return figure


def caption_layers(caption: Caption, layers: Sequence[int]) -> Figure:
    """Heatmaps of a caption's tokens by layers: norm, change from the layer below, and similarity
    to the last layer; see :class:`semroute.pipeline.inspection.CaptionLayers`.

    Args:
        caption: from a store, ``store[3]``.
        layers: of that store.
    """
    measured = measure_caption(caption.hidden)
    num_tokens = len(caption.hidden)
    figure = Figure(figsize=(14, 1.6 + min(6.0, 0.2 * num_tokens)), layout="constrained")
    short = textwrap.shorten(caption.text, 100, placeholder=" …") or "(the null caption)"
    figure.suptitle(plain(short), color=INK, fontsize=10)
    kinds = [
        ("norm", measured.norm, "L2 norm of h", LogNorm()),
        ("change from the layer below", measured.change, "relative distance of LN(h)", None),
        ("similarity to the last layer", measured.similarity, "cosine of LN(h)", None),
    ]
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, (title, values, unit, norm) in zip(panels, kinds, strict=True):
        image = axes.imshow(values, COLOUR_MAP, norm=norm, aspect="auto", interpolation="nearest")
        axes.set_title(title, color=INK, fontsize=9)
        layer_ticks(axes.xaxis, layers)
        axes.set_xlabel("LLM layer", color=INK)
        clean(axes)
        _colour_bar(figure, image, axes, unit)
    every = range(0, num_tokens, -(-num_tokens // 20))
    panels[0].set_yticks(every, [str(number + 1) for number in every])
    panels[0].set_ylabel("token", color=INK)
    return figure


def error_by_layer(errors: Mapping[int, float], codec: str) -> Figure:
    """Mean error of LN(h) by layer.

    Args:
        errors: from :func:`semroute.layer_error`.
        codec: name of the codec that made them.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(errors)), list(errors.values()), width=0.8, color=LINES[0])
    _finish(axes, list(errors), f"Error of the codec, {codec}", "mean relative error of LN(h)")
    return figure


def token_lengths(store: FeatureStore) -> Figure:
    """Histogram of tokens per caption, with cut captions in a colour of their own."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.add_subplot()
    lengths = numbers(store.captions["num_tokens"])
    cut = numbers(store.captions["num_cut_tokens"]) > 0
    width = max(1, -(-int(lengths.max()) // 80))
    edges = np.arange(0.5, lengths.max() + width + 0.5, width).tolist()
    kinds = [("whole", lengths[~cut], LINES[0]), ("cut", lengths[cut], LINES[1])]
    names, values, colours = zip(*(kind for kind in kinds if len(kind[1])), strict=True)
    axes.hist(values, edges, stacked=True, color=colours, label=names)
    axes.axvline(lengths.mean(), color=INK, linewidth=1, linestyle="--")
    if cut.any():
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.set_title(f"Tokens per caption, {lengths.mean():.1f} on average", color=INK, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens per caption", color=INK)
    axes.set_ylabel("number of captions", color=INK)
    clean(axes)
    return figure


def probe_accuracy(results: ProbeResults, routing: Routing | None = None) -> Figure:
    """Accuracy of linear probes by layer, and the weights of a router below.

    Bands are 95 % intervals over captions, dashed lines chance; a dot marks the best layer.

    Args:
        routing: of a run; its mean over blocks is plotted.
    """
    num = len(results.probes)
    columns = min(3, num)
    rows = -(-num // columns) + (routing is not None)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.3 * rows + 0.4), layout="constrained")
    title = f"What layers know ({results.pool} over tokens); dot: best layer, dashed: chance"
    figure.suptitle(title, color=INK, fontsize=10)
    grid = figure.add_gridspec(rows, columns)
    positions = range(len(results.layers))
    for number, probe in enumerate(results.probes):
        axes = figure.add_subplot(grid[divmod(number, columns)])
        axes.fill_between(positions, probe.low, probe.high, color=LINES[0], alpha=0.25, linewidth=0)
        axes.plot(
            positions, probe.accuracy, color=LINES[0], marker="o", markersize=2.5, linewidth=1
        )
        axes.axhline(probe.chance, color=FAINT, linewidth=1, linestyle="--")
        axes.plot(probe.best, probe.accuracy[probe.best], "o", color=LINES[1], markersize=5)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        clean(axes)
        layer_ticks(axes.xaxis, results.layers, most=8)
        title = f"{plain(readable(probe.label))} ({probe.num_classes} classes)"
        axes.set_title(title, color=INK, fontsize=9)
        axes.set_ylabel("accuracy", color=INK, fontsize=8)
    if routing is not None:
        axes = figure.add_subplot(grid[rows - 1, :])
        mean = dict(zip(routing.layers, np.mean(routing.weights, axis=0), strict=True))
        axes.bar(
            positions, [mean.get(layer, 0.0) for layer in results.layers], width=0.8, color=LINES[2]
        )
        axes.axhline(1 / len(mean), color=INK, linewidth=1, linestyle="--")
        clean(axes)
        layer_ticks(axes.xaxis, results.layers)
        axes.set_title("what the router reads; dashed: uniform", color=INK, fontsize=9)
        axes.set_ylabel("mean weight", color=INK, fontsize=8)
    figure.supxlabel("LLM layer", color=INK, fontsize=9)
    return figure


def _colour_bar(figure: Figure, image: Any, axes: Axes, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        log_axis(bar.ax)
    bar.set_label(label, color=INK, fontsize=8)
    bar.ax.tick_params(which="both", colors=INK, labelsize=8)


def _finish(axes: Axes, layers: Sequence[int], title: str, label: str) -> None:
    """Add titles, and the layers along the x axis."""
    axes.figure.suptitle(title, color=INK, fontsize=10)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    layer_ticks(axes.xaxis, layers)
    axes.set_xlabel("LLM layer", color=INK)
    axes.set_ylabel(label, color=INK, fontsize=8)
    clean(axes)
