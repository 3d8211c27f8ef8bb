"""Figures of a run: what was learned, how, and what comes out. No global matplotlib state.

Every function returns a matplotlib ``Figure``: a notebook shows it, ``savefig`` writes it.

Shapes: D blocks, L layers, T noise levels, N images.
"""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from ..pipeline.style import (
    COLOUR_MAP,
    DPI,
    FAINT,
    INK,
    LINES,
    SIGNED_COLOUR_MAP,
    Figure,
    clean,
    layer_ticks,
)
from ..schemas import InputError

RIGHT, WRONG = "#1b8a5a", "#c8553d"
CAPTIONS = "captions.jsonl"
"""In a folder of pictures: a line a picture, its file and its caption."""


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


def sample_grid(
    images: NDArray[np.uint8],
    captions: Sequence[str],
    marks: Sequence[bool] | None = None,
    *,
    columns: int = 6,
) -> Figure:
    """Images over their captions, enlarged pixel by pixel.

    Args:
        images: [N, height, width, 3] uint8.
        marks: whether each is right: a green tick or a red cross, and a frame of that colour.

    Raises:
        InputError: no images, or not one caption (and mark) an image.
    """
    found = {len(images), len(captions), len(images if marks is None else marks)}
    if len(found) > 1 or not len(images):
        raise InputError(
            f"found {len(images)} images, {len(captions)} captions and "
            f"{'no' if marks is None else len(marks)} marks, expected one of each an image"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    wrapped = [textwrap.wrap(caption, 24) or [""] for caption in captions]
    lines = max(map(len, wrapped))
    figure = Figure(
        figsize=(1.75 * columns + 0.1, (1.75 + 0.15 * lines) * rows + 0.1),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(images) :]:
        axes.set_visible(False)
    for number, (axes, image, text) in enumerate(zip(panels.flat, images, wrapped, strict=False)):
        axes.imshow(image, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        padded = text + [""] * (lines - len(text))  # so that all rows of panels are alike
        axes.set_xlabel("\n".join(padded), fontsize=8, color=INK, labelpad=3)
        axes.spines[:].set_visible(False)
        if marks is not None:
            colour = RIGHT if marks[number] else WRONG
            axes.spines[:].set(visible=True, color=colour, linewidth=2)
            axes.text(
                1.0,
                1.0,
                "✓" if marks[number] else "✗",
                transform=axes.transAxes,
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold",
                color="white",
                bbox={"boxstyle": "circle,pad=0.15", "facecolor": colour, "edgecolor": "none"},
            )
    return figure


def accuracy_bars(scores: pa.Table, title: str = "Accuracy by skill") -> Figure:
    """One bar per skill and split with its 95 % interval, and chance as a mark across it.

    Args:
        scores: ``EVALUATION_SCHEMA``, see :class:`semroute.trainer.evaluation.Evaluation`.
    """
    by_split: dict[str, dict[str, dict[str, Any]]] = {}
    for row in scores.to_pylist():
        by_split.setdefault(row["split"], {})[row["skill"]] = row
    skills = list(dict.fromkeys(scores.column("skill").to_pylist()))
    figure = Figure(figsize=(1.6 + 1.1 * len(skills), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(by_split)
    chances = []
    for number, (split, rows) in enumerate(by_split.items()):
        places = [
            skills.index(skill) + width * (number - (len(by_split) - 1) / 2) for skill in rows
        ]
        heights = [row["accuracy"] for row in rows.values()]
        below = [row["accuracy"] - row["low"] for row in rows.values()]
        above = [row["high"] - row["accuracy"] for row in rows.values()]
        axes.bar(
            places,
            heights,
            width * 0.92,
            yerr=np.clip([below, above], 0, None),
            color=LINES[number % len(LINES)],
            ecolor=INK,
            error_kw={"linewidth": 1.2, "capsize": 2.5},
            label=split,
        )
        chances += [
            (place, row["chance"])
            for place, row in zip(places, rows.values(), strict=True)
            if row["chance"] is not None
        ]
    if chances:
        axes.hlines(
            [chance for _, chance in chances],
            [place - width / 2 for place, _ in chances],
            [place + width / 2 for place, _ in chances],
            color="black",
            linewidth=1.6,
            linestyle=(0, (1.5, 1)),
            label="chance",
        )
    axes.set_xticks(range(len(skills)), skills)
    axes.set_ylim(0, 1)
    axes.set_title(title, color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    clean(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda number: labels[number] == "chance")
    figure.legend(
        [handles[number] for number in order],
        [labels[number] for number in order],
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
        labelcolor=INK,
    )
    return figure


def save_images(
    out: Path, images: NDArray[np.uint8], captions: Sequence[str], grid: Figure
) -> list[Path]:
    """Write each image as a PNG, ``captions.jsonl`` that says which is which, and a grid of all.

    Args:
        images: uint8 [N, height, width, 3].
        grid: from :func:`sample_grid`.

    Returns:
        The grid, and the list of captions.
    """
    out.mkdir(parents=True, exist_ok=True)
    listed = out / CAPTIONS
    if listed.exists():  # of an earlier time, perhaps with more pictures
        for line in listed.read_text("utf-8").splitlines():
            (out / Path(json.loads(line)["image"]).name).unlink(missing_ok=True)
    lines = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        name = f"{number:06d}.png"
        Image.fromarray(image).save(out / name)
        lines.append(json.dumps({"image": name, "caption": caption}, ensure_ascii=False))
    listed.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    grid.savefig(out / "grid.png", dpi=DPI)
    return [out / "grid.png", listed]


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
