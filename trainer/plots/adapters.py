"""Figures of what a pretrained network learned besides routing weights.

Shapes: K layers or blocks, M linear layers with LoRA.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from ...pipeline.style import FAINT, INK, LINES, Figure, layer_ticks, plain
from .axes import label, legend_below, line_colours


def layer_weights(
    before: Sequence[float],
    after: Sequence[float],
    names: Sequence[int],
    title: str,
    x: str,
    y: str = "weight",
) -> Figure:
    """Weights [K] of a pretrained network before and after training, side by side.

    Args:
        names: along the x axis, one per weight; ``x`` says what they are, ``y`` what the weights
            are.
    """
    figure = Figure(figsize=(max(6.0, 2.0 + 0.45 * len(names)), 3.2), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(names))
    bars = [
        axes.bar(places + shift, values, width=0.4, color=colour)
        for shift, values, colour in ((-0.2, before, FAINT), (0.2, after, LINES[0]))
    ]
    axes.axhline(0, color=INK, linewidth=0.6)
    label(axes, x, y, title)
    axes.set_axisbelow(True)
    layer_ticks(axes.xaxis, names)
    legend_below(figure, bars, ["pretrained", "learned"], columns=2)
    return figure


def lora_sizes(norms: Mapping[str, float], title: str) -> Figure:
    """Size of the change that LoRA makes to each linear layer, over the blocks of the network.

    Args:
        norms: name of a linear layer, such as ``transformer_blocks.3.attn.to_q`` -> Frobenius norm
            of its change. Layers without a number in their name form a block of their own.
    """
    places = {name: _place(name) for name in norms}
    blocks = sorted({block for block, _ in places.values()})
    numbers = {block: number for number, block in enumerate(blocks, 1)}
    lines: dict[str, dict[int, float]] = {}
    for name, (block, kind) in sorted(places.items(), key=lambda item: item[1]):
        lines.setdefault(kind, {})[numbers[block]] = norms[name]
    figure = Figure(figsize=(7.0, 3.4 + 0.12 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    handles = [
        axes.plot([*line], [*line.values()], marker="o", markersize=3, color=colour)[0]
        for line, colour in zip(lines.values(), line_colours(len(lines)), strict=True)
    ]
    label(axes, "block", "norm of the change", title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    legend_below(figure, handles, [*map(plain, lines)], columns=4, fontsize=8)
    return figure


def _place(name: str) -> tuple[tuple[bool, str, int], str]:
    """The block of a linear layer, in the order of execution, and its name inside."""
    match = re.match(r"(.*?)\.(\d+)\.(.+)", name)
    if match is None:
        return (False, "", 0), name
    blocks, number, kind = match.groups()
    return (blocks.startswith("single"), blocks, int(number)), kind  # single streams come last
