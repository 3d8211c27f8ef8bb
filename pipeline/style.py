"""How every figure looks."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

COLOUR_MAP = "viridis"
INK, FAINT = "#1f2933", "#9aa5b1"
LINES = ("#31688e", "#e07a5f", "#35b779", "#8e5ea2")
DPI = 150


def clean(axes: Axes, sides: Iterable[str] = ("top", "right")) -> None:
    """No frame at some sides, a faint one at the others, small ticks."""
    axes.spines[list(sides)].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", colors=INK, labelsize=8)


def layer_ticks(axes: Axes, layers: Sequence[int], most: int = 16) -> None:
    """LLM layers along the x axis, which counts positions; not every one where they are many."""
    step = -(-len(layers) // most)
    places = range(0, len(layers), step)
    axes.set_xticks(places, [str(layers[place]) for place in places])
    axes.tick_params(colors=INK, labelsize=8)
