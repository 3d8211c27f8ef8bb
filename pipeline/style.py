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
DARK = {
    INK: "#e4e7eb",
    FAINT: "#7b8794",
    LINES[0]: "#6fb1dc",
    LINES[1]: "#f0957f",
    LINES[2]: "#4fd093",
    LINES[3]: "#c29be0",
}
"""Colours on a light ground -> on a dark one."""
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


def themed_svg(figure: Figure) -> str:
    """A figure as SVG whose ink, lines and ground follow a reader's light or dark theme."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "semroute"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    rules = {"light": "", "dark": ""}
    for number, (light, dark) in enumerate(DARK.items()):
        text = text.replace(light, f"var(--c{number})")
        rules["light"] += f"--c{number}:{light};"
        rules["dark"] += f"--c{number}:{dark};"
    style = (
        f"<style>:root{{{rules['light']}}}"
        f"@media (prefers-color-scheme: dark){{:root{{{rules['dark']}}}}}</style>"
    )
    start = text.index("<svg")
    end = text.index(">", start) + 1
    return text[start:end] + style + text[end:]


def plain(text: object) -> str:
    """A text of somebody else's as a figure shows it: in one line, and a dollar sign is one."""
    return one_line(str(text)).replace("$", r"\$")


def readable(name: str) -> str:
    """The name of a nested column as people say it: ``scene.objects.0.colour`` is "object 1:
    colour", and ``scene.kind`` is "scene kind"."""
    *outer, last = name.split(".")
    place = next((n for n, part in enumerate(outer) if n and part.isdecimal()), None)
    if place is None:
        return " ".join([*outer, last]).replace("_", " ")
    kind = outer[place - 1].removesuffix("s").replace("_", " ")
    inner = " ".join([*outer[place + 1 :], last]).replace("_", " ")
    return f"{kind} {int(outer[place]) + 1}: {inner}"


def clean(axes: Axes, sides: Iterable[str] = ("top", "right")) -> None:
    """Remove the frame at some sides, and make the rest of it faint and its ticks small."""
    axes.spines[list(sides)].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=8)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")


def layer_ticks(axis: Axis, layers: Sequence[int], most: int = 16) -> None:
    """Label the positions along an axis with LLM layers, or every few if there are many."""
    step = -(-len(layers) // most)
    positions = range(0, len(layers), step)
    axis.set_ticks(positions, [str(layers[position]) for position in positions])
    axis.set_tick_params(colors=INK, labelsize=8)
