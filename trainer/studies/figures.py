"""Figures of a study."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

from ...pipeline.style import FAINT, INK, LINES, Figure, clean
from ..shapes.judge import SKILLS
from .statistics import Chance, Outline, comparison_rows

LEFT_OUT = ("all", "count", "colour", "shape", "binding")
"""Skills of which it is shown what each layer is worth."""


def score_panels(claims: pa.Table, lucky: Chance, outline: Outline) -> Figure:
    """Accuracy of every arm at the last guidance scale: a panel a split and skill."""
    cfg_scale = outline.scoring.cfg_scales[-1]
    skills = [skill for skill in SKILLS if skill in {*claims["skill"].to_pylist()}]
    arms = [*outline.arms]
    size = (1.2 + 1.75 * len(skills), 0.8 + len(lucky) * (0.7 + 0.24 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lucky), len(skills), sharey=True, squeeze=False)
    title = f"Accuracy at guidance {cfg_scale:g}, mean and 95 % over {outline.unit}"
    figure.suptitle(title, color=INK)
    for line, split in zip(axes, lucky, strict=True):
        rows = comparison_rows(claims, split, cfg_scale)
        for place, skill in zip(line, skills, strict=True):
            clean(place)
            place.set_title(f"{split}: {skill}", color=INK, fontsize="small")
            for row in (row for row in rows if row["skill"] == skill):
                height = arms.index(row["arm"])
                colour = _colour(height, len(arms))
                num = len(row["seeds"])
                place.plot(row["seeds"], [height] * num, ".", color=colour, alpha=0.4)
                if row["low"] is not None:
                    place.plot([row["low"], row["high"]], [height] * 2, color=colour)
                place.plot(row["accuracy"], height, "o", color=colour)
            if (base := lucky[split].get(skill)) is not None:
                place.axvline(base, color=FAINT, linestyle="--", linewidth=1)
            place.xaxis.set_major_formatter(PercentFormatter(1.0))
            place.tick_params(labelsize="x-small")
        line[0].set_yticks(range(len(arms)), arms, fontsize="small")
        line[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def guidance_panels(claims: pa.Table, lucky: Chance, outline: Outline) -> Figure:
    """Accuracy against the guidance scale: a line an arm, a panel a split and skill."""
    skills = [s for s in ("count", "binding", "all") if s in {*claims["skill"].to_pylist()}]
    size = (1.5 + 3.0 * len(skills), 0.8 + 2.4 * len(lucky))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(lucky), len(skills), sharex=True, squeeze=False)
    for line, split in zip(axes, lucky, strict=True):
        for place, skill in zip(line, skills, strict=True):
            clean(place)
            place.set_title(f"{split}: {skill}", color=INK, fontsize="small")
            for number, arm in enumerate(outline.arms):
                rows = [
                    row
                    for scale in outline.scoring.cfg_scales
                    for row in comparison_rows(claims, split, scale)
                    if (row["skill"], row["arm"]) == (skill, arm)
                ]
                place.plot(
                    [row["cfg_scale"] for row in rows],
                    [row["accuracy"] for row in rows],
                    **_line(number, len(outline.arms)),
                    label=arm,
                )
            if (base := lucky[split].get(skill)) is not None:
                place.axhline(base, color=FAINT, linestyle="--", linewidth=1)
            place.yaxis.set_major_formatter(PercentFormatter(1.0))
    for place in axes[-1]:
        place.set_xlabel("guidance scale", color=INK)
    _add_legend(figure, axes[0, 0])
    return figure


def counting_panels(table: pa.Table, outline: Outline) -> Figure:
    """Objects drawn against objects asked for: a panel a guidance scale, a line an arm."""
    scales = outline.scoring.cfg_scales
    figure = Figure(figsize=(1.5 + 2.8 * len(scales), 3.4), layout="constrained")
    axes = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    table = table.group_by(["arm", "cfg_scale", "num_asked"]).aggregate([("num_found", "mean")])
    table = table.sort_by("num_asked")
    for place, scale in zip(axes, scales, strict=True):
        clean(place)
        place.set_title(f"guidance {scale:g}", color=INK, fontsize="small")
        place.set_xlabel("objects asked for", color=INK)
        for number, arm in enumerate(outline.arms):
            mask = pc.and_(pc.equal(table["arm"], arm), pc.equal(table["cfg_scale"], scale))
            part = table.filter(mask)
            asked, found = part["num_asked"].to_numpy(), part["num_found_mean"].to_numpy()
            place.plot(asked, found, **_line(number, len(outline.arms)), label=arm)
        place.axline((1, 1), slope=1, color=FAINT, linestyle="--", linewidth=1)
    axes[0].set_ylabel("objects drawn", color=INK)
    _add_legend(figure, axes[0])
    return figure


def left_out_panels(
    claims: pa.Table, arms: Mapping[int, str], weights: np.ndarray, outline: Outline
) -> Figure:
    """What leaving out a layer does to accuracy at the last guidance scale, a panel a skill; and
    the weight that the layer has.

    Args:
        arms: each of the L layers -> what the arm without it is called, if there is one.
        weights: as trained, mean over runs, ``[D, L]``.
    """
    cfg_scale, layers = outline.scoring.cfg_scales[-1], [*arms]
    splits = [*dict.fromkeys(claims["split"].to_pylist())]
    skills = [skill for skill in LEFT_OUT if skill in {*claims["skill"].to_pylist()}]
    size = (2.8 + 0.24 * len(layers), 0.8 + 1.8 * (len(skills) + 1))
    figure = Figure(figsize=size, layout="constrained")
    title = f"Without a layer, guidance {cfg_scale:g}: difference and 95 % over {outline.unit}"
    figure.suptitle(title, color=INK)
    axes = figure.subplots(len(skills) + 1, 1, sharex=True)
    for place, skill in zip(axes, skills, strict=False):
        clean(place)
        place.set_title(skill, color=INK, fontsize="small")
        place.axhline(0.0, color=FAINT, linestyle="--", linewidth=1)
        for number, split in enumerate(splits):
            rows = {
                row["arm"]: row
                for row in comparison_rows(claims, split, cfg_scale)
                if row["skill"] == skill
            }
            found = [(n, rows[arm]) for n, arm in arms.items() if arm in rows]
            shift, colour = 0.4 * (number / len(splits) - 0.25), _colour(number, len(splits))
            at, values = [n + shift for n, _ in found], [row["difference"] for _, row in found]
            place.plot(at, values, "o", markersize=4, color=colour, label=split)
            for x, (_, row) in zip(at, found, strict=True):
                if row["seeds_low"] is not None:
                    place.plot([x, x], [row["seeds_low"], row["seeds_high"]], color=colour)
    last = axes[-1]
    clean(last)
    last.set_title("weight: mean over blocks, and least to most", color=INK, fontsize="small")
    last.axhline(1 / len(layers), color=FAINT, linestyle="--", linewidth=1)
    last.vlines(layers, weights.min(0), weights.max(0), color=LINES[0], alpha=0.5)
    last.plot(layers, weights.mean(0), "o", markersize=4, color=LINES[0])
    last.set_xlabel("LLM layer", color=INK)
    _add_legend(figure, axes[0])
    return figure


def _colour(number: int, num_arms: int) -> Any:
    """Of an arm: all differ, up to ten."""
    return LINES[number] if num_arms <= len(LINES) else colormaps["tab10"](number % 10)


def _line(number: int, num_arms: int) -> dict[str, Any]:
    """How the line of an arm is drawn: all differ, up to forty."""
    marker, dashes = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))[number // 10 % 4]
    return {"color": _colour(number, num_arms), "marker": marker, "linestyle": dashes}


def _add_legend(figure: Figure, axes: Any) -> None:
    """Beside the panels; the figure grows where there are many arms."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.4 + 0.2 * len(labels)))
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.4
    )
