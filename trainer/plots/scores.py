"""Figures of scores."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.ticker import PercentFormatter

from ...pipeline.style import FAINT, INK, LINES, Figure, clean, plain
from .axes import legend_below


def accuracy_bars(scores: pa.Table, title: str = "Accuracy by skill") -> Figure:
    """One bar per skill and split, with its 95 % interval and a mark at chance.

    Args:
        scores: ``EVALUATION_SCHEMA``, see :class:`semroute.trainer.runs.scores.Evaluation`.
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
        # Bars of a skill stand side by side, centred on its tick.
        offset = width * (number - (len(by_split) - 1) / 2)
        centres = [skills.index(skill) + offset for skill in rows]
        heights = [row["accuracy"] for row in rows.values()]
        below = [row["accuracy"] - row["low"] for row in rows.values()]
        above = [row["high"] - row["accuracy"] for row in rows.values()]
        axes.bar(
            centres,
            heights,
            width * 0.92,
            yerr=np.clip([below, above], 0, None),
            color=LINES[number % len(LINES)],
            ecolor=INK,
            error_kw={"linewidth": 1.2, "capsize": 2.5},
            label=plain(split),
        )
        chances += [
            (centre, row["chance"])
            for centre, row in zip(centres, rows.values(), strict=True)
            if row["chance"] is not None
        ]
    if chances:
        axes.hlines(
            [chance for _, chance in chances],
            [centre - width / 2 for centre, _ in chances],
            [centre + width / 2 for centre, _ in chances],
            color=INK,
            linewidth=1.6,
            linestyle=(0, (1.5, 1)),
            label="chance",
        )
    axes.set_xticks(range(len(skills)), [*map(plain, skills)])
    axes.set_ylim(0, 1)
    axes.set_xlabel("skill", color=INK)
    axes.set_ylabel("accuracy", color=INK)
    axes.set_title(plain(title), color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    clean(axes)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda number: labels[number] == "chance")
    legend_below(
        figure,
        [handles[number] for number in order],
        [labels[number] for number in order],
        columns=len(order),
    )
    return figure
