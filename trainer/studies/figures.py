"""Figures of a study."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import colormaps
from matplotlib.ticker import NullLocator, PercentFormatter

from ...pipeline.style import FAINT, INK, LINES, Figure, clean, plain
from ...schemas.arrow import ascending, grouped
from ..shapes.judge import SKILLS
from .statistics import ChanceLevels, ComparisonDesign, comparison_rows

LEFT_OUT_SKILLS = ("all", "count", "colour", "shape", "binding")
"""Skills in :func:`left_out_figure`."""


def score_figure(
    comparison: pa.Table, chance_levels: ChanceLevels, design: ComparisonDesign
) -> Figure:
    """Accuracy of every arm at the last guidance scale: one panel per split and skill."""
    cfg_scale = design.scoring.cfg_scales[-1]
    skills = [skill for skill in SKILLS if skill in {*comparison["skill"].to_pylist()}]
    arms = [*design.drawn]
    size = (1.2 + 1.75 * len(skills), 0.8 + len(chance_levels) * (0.7 + 0.24 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(chance_levels), len(skills), sharey=True, squeeze=False)
    title = f"Accuracy at guidance {cfg_scale:g}, mean and 95 % over {design.unit}"
    figure.suptitle(title, color=INK)
    for panel_row, split in zip(panels, chance_levels, strict=True):
        rows = comparison_rows(comparison, split, cfg_scale)
        for axes, skill in zip(panel_row, skills, strict=True):
            clean(axes)
            axes.set_title(f"{plain(split)}: {skill}", color=INK, fontsize="small")
            for row in rows:
                if row["skill"] != skill or row["arm"] not in arms:
                    continue
                height = arms.index(row["arm"])
                colour = _colour(height, len(arms))
                num = len(row["seeds"])
                axes.plot(row["seeds"], [height] * num, ".", color=colour, alpha=0.4)
                if row["low"] is not None:
                    axes.plot([row["low"], row["high"]], [height] * 2, color=colour)
                axes.plot(row["accuracy"], height, "o", color=colour)
            if (level := chance_levels[split].get(skill)) is not None:
                axes.axvline(level, color=FAINT, linestyle="--", linewidth=1)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.tick_params(labelsize="x-small")
        panel_row[0].set_yticks(range(len(arms)), [*map(plain, arms)], fontsize="small")
        panel_row[0].set_ylim(len(arms) - 0.5, -0.5)
        panel_row[0].set_ylabel("arm", color=INK)
    figure.supxlabel("accuracy", color=INK, fontsize="medium")
    return figure


def guidance_figure(
    comparison: pa.Table, chance_levels: ChanceLevels, design: ComparisonDesign
) -> Figure:
    """Accuracy against the guidance scale: one line per arm, one panel per split and skill."""
    skills = _in_curves(comparison)
    figure, panels = _curves(len(chance_levels), len(skills))
    for panel_row, split in zip(panels, chance_levels, strict=True):
        for axes, skill in zip(panel_row, skills, strict=True):
            clean(axes)
            axes.set_title(f"{plain(split)}: {skill}", color=INK, fontsize="small")
            for number, arm in enumerate(design.drawn):
                rows = [
                    row
                    for scale in design.scoring.cfg_scales
                    for row in comparison_rows(comparison, split, scale)
                    if (row["skill"], row["arm"]) == (skill, arm)
                ]
                axes.plot(
                    [row["cfg_scale"] for row in rows],
                    [row["accuracy"] for row in rows],
                    **_line(number, len(design.drawn)),
                    label=plain(arm),
                )
            if (level := chance_levels[split].get(skill)) is not None:
                axes.axhline(level, color=FAINT, linestyle="--", linewidth=1)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _label(figure, panels, "guidance scale", "accuracy")
    return figure


def counting_figure(table: pa.Table, design: ComparisonDesign) -> Figure:
    """Objects generated against objects requested: one panel per guidance scale, a line per arm."""
    scales = design.scoring.cfg_scales
    figure = Figure(figsize=(1.5 + 2.8 * len(scales), 3.4), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    groups = grouped(table, ["arm", "cfg_scale", "num_asked"])
    table = ascending(groups.aggregate([("num_found", "mean")]), ["num_asked"])
    for axes, scale in zip(panels, scales, strict=True):
        clean(axes)
        axes.set_title(f"guidance {scale:g}", color=INK, fontsize="small")
        axes.set_xlabel("objects requested", color=INK)
        for number, arm in enumerate(design.drawn):
            mask = pc.and_(pc.equal(table["arm"], arm), pc.equal(table["cfg_scale"], scale))
            part = table.filter(mask)
            asked, found = part["num_asked"].to_numpy(), part["num_found_mean"].to_numpy()
            axes.plot(asked, found, **_line(number, len(design.drawn)), label=plain(arm))
        axes.axline((1, 1), slope=1, color=FAINT, linestyle="--", linewidth=1)
    panels[0].set_ylabel("objects generated", color=INK)
    _add_legend(figure, panels[0])
    return figure


def training_figure(comparison: pa.Table, design: ComparisonDesign) -> Figure:
    """Differences between arms against the step at which they are scored, at the first guidance
    scale: one line per arm with 95 % intervals, one panel per split and skill."""
    cfg_scale = design.scoring.cfg_scales[0]
    splits = [*dict.fromkeys(comparison["split"].to_pylist())]
    skills = _in_curves(comparison)
    compared = {a: s for a, s in design.along.items() if design.references.get(a, a) != a}
    figure, panels = _curves(len(splits), len(skills))
    title = f"Difference and 95 % over {design.unit} during training, guidance {cfg_scale:g}"
    figure.suptitle(title, color=INK)
    for panel_row, split in zip(panels, splits, strict=True):
        rows = comparison_rows(comparison, split, cfg_scale)
        for axes, skill in zip(panel_row, skills, strict=True):
            clean(axes)
            axes.set_title(f"{plain(split)}: {skill}", color=INK, fontsize="small")
            axes.axhline(0.0, color=FAINT, linestyle="--", linewidth=1)
            found = {row["arm"]: row for row in rows if row["skill"] == skill}
            for number, (arm, steps) in enumerate(compared.items()):
                points = {
                    step: found[name]
                    for step, name in sorted(steps.items())
                    if name in found and found[name]["difference"] is not None
                }
                if not points:
                    continue
                aside = 1.02 ** (number - len(compared) / 2)  # intervals lie side by side
                style = _line(number, len(compared))
                x = [step * aside for step in points]
                axes.plot(x, [r["difference"] for r in points.values()], **style, label=plain(arm))
                for at, row in zip(x, points.values(), strict=True):
                    if row["seeds_low"] is not None:
                        low, high = row["seeds_low"], row["seeds_high"]
                        axes.plot([at, at], [low, high], color=style["color"], alpha=0.6)
            axes.set_xscale("log")
            axes.set_xticks([*dict.fromkeys(s for steps in design.along.values() for s in steps)])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_locator(NullLocator())
    _label(figure, panels, "training steps", "difference in accuracy")
    return figure


def left_out_figure(
    comparison: pa.Table, arms: Mapping[int, str], weights: np.ndarray, design: ComparisonDesign
) -> Figure:
    """Accuracy lost or gained by leaving out a layer, at the last guidance scale, one panel per
    skill; and the weight of each layer.

    Args:
        arms: each of the L layers -> name of the arm without it, whether or not there is one.
        weights: as trained, mean over runs, ``[D, L]``.
    """
    cfg_scale, layers = design.scoring.cfg_scales[-1], [*arms]
    splits = [*dict.fromkeys(comparison["split"].to_pylist())]
    skills = [skill for skill in LEFT_OUT_SKILLS if skill in {*comparison["skill"].to_pylist()}]
    size = (2.8 + 0.24 * len(layers), 0.8 + 1.8 * (len(skills) + 1))
    figure = Figure(figsize=size, layout="constrained")
    title = f"Without a layer, guidance {cfg_scale:g}: difference and 95 % over {design.unit}"
    figure.suptitle(title, color=INK)
    panels = figure.subplots(len(skills) + 1, 1, sharex=True)
    for axes, skill in zip(panels, skills, strict=False):
        clean(axes)
        axes.set_title(skill, color=INK, fontsize="small")
        axes.set_ylabel("difference", color=INK, fontsize="small")
        axes.axhline(0.0, color=FAINT, linestyle="--", linewidth=1)
        for number, split in enumerate(splits):
            rows = {
                row["arm"]: row
                for row in comparison_rows(comparison, split, cfg_scale)
                if row["skill"] == skill
            }
            shown = [(layer, rows[arm]) for layer, arm in arms.items() if arm in rows]
            shift, colour = 0.4 * (number / len(splits) - 0.25), _colour(number, len(splits))
            positions = [layer + shift for layer, _ in shown]
            differences = [row["difference"] for _, row in shown]
            axes.plot(positions, differences, "o", markersize=4, color=colour, label=plain(split))
            for x, (_, row) in zip(positions, shown, strict=True):
                if row["seeds_low"] is not None:
                    axes.plot([x, x], [row["seeds_low"], row["seeds_high"]], color=colour)
    last = panels[-1]
    clean(last)
    last.set_title("weight: mean over blocks, and least to most", color=INK, fontsize="small")
    last.axhline(1 / len(layers), color=FAINT, linestyle="--", linewidth=1)
    last.vlines(layers, weights.min(0), weights.max(0), color=LINES[0], alpha=0.5)
    last.plot(layers, weights.mean(0), "o", markersize=4, color=LINES[0])
    last.set_xlabel("LLM layer", color=INK)
    last.set_ylabel("weight", color=INK, fontsize="small")
    _add_legend(figure, panels[0])
    return figure


def _in_curves(comparison: pa.Table) -> list[str]:
    """Skills whose curves are drawn."""
    found = {*comparison["skill"].to_pylist()}
    return [skill for skill in ("count", "binding", "all") if skill in found]


def _curves(num_rows: int, num_columns: int) -> tuple[Figure, Any]:
    """A figure, and its panels [rows, columns] with one x axis."""
    size = (1.5 + 3.0 * num_columns, 0.8 + 2.4 * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, sharex=True, squeeze=False)


def _label(figure: Figure, panels: Any, x: str, y: str) -> None:
    """Name the axes of panels [rows, columns] at the edges, and add a legend."""
    for axes in panels[-1]:
        axes.set_xlabel(x, color=INK)
    for axes in panels[:, 0]:
        axes.set_ylabel(y, color=INK)
    _add_legend(figure, panels[0, 0])


def _colour(number: int, num_arms: int) -> Any:
    """Colour of an arm; up to ten arms have different colours."""
    return LINES[number] if num_arms <= len(LINES) else colormaps["tab10"](number % 10)


def _line(number: int, num_arms: int) -> dict[str, Any]:
    """Style of an arm's line; up to forty arms have different styles."""
    marker, dashes = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))[number // 10 % 4]
    return {"color": _colour(number, num_arms), "marker": marker, "linestyle": dashes}


def _add_legend(figure: Figure, axes: Any) -> None:
    """Add a legend beside the panels, and enlarge the figure if there are many arms."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.4 + 0.2 * len(labels)))
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.4
    )
