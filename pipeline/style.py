"""Look of all figures."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from ..schemas import write_whole
from ..schemas.escaping import one_line

COLOUR_MAP = "viridis"
SIGNED_COLOUR_MAP = "RdBu_r"
INK, FAINT = "#1f2933", "#9aa5b1"
LINES = ("#31688e", "#e07a5f", "#35b779", "#8e5ea2")
DPI = 150


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows by itself, whether or not it uses pyplot, and whose file is
    there whole or not at all."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """As of matplotlib.

        Args:
            fname: a path, whose suffix names the format, or an open file.
        """
        if not isinstance(fname, (str, os.PathLike)):
            super().savefig(fname, **options)
            return
        content, path = io.BytesIO(), Path(fname)
        super().savefig(content, **{"format": path.suffix[1:] or "png", **options})
        write_whole(path, content.getvalue())

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        width, height = (round(100 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


def plain(text: object) -> str:
    """A text of somebody else's as a figure shows it: in one line, and a dollar sign is one."""
    return one_line(str(text)).replace("$", r"\$")


def clean(axes: Axes, sides: Iterable[str] = ("top", "right")) -> None:
    """Remove the frame at some sides, and make the rest of it faint and its ticks small."""
    axes.spines[list(sides)].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=8)


def layer_ticks(axis: Axis, layers: Sequence[int], most: int = 16) -> None:
    """Label the positions along an axis with LLM layers, or every few if there are many."""
    step = -(-len(layers) // most)
    positions = range(0, len(layers), step)
    axis.set_ticks(positions, [str(layers[position]) for position in positions])
    axis.set_tick_params(colors=INK, labelsize=8)
