"""What every figure must have."""

from typing import Any


def untitled(figure: Any) -> list[str]:
    """Axes with ticks whose titles are missing; a title may be the figure's, that of axes which
    share theirs, or that of the row (for y) or column (for x) of panels."""
    missing = []
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.axison]
    for axes in shown:
        for side in "xy":
            get = f"get_{side}label"
            shared = {*getattr(axes, f"get_shared_{side}_axes")().get_siblings(axes)}
            shared |= {other for other in shown if _along(axes, other, side)}
            ticks = [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]
            if not any(ticks) or any(getattr(other, get)() for other in shared):
                continue
            if not getattr(figure, f"get_sup{side}label")():
                missing.append(f"{side} of {axes.get_title() or axes.get_label()!r}")
    return missing


def _along(axes: Any, other: Any, side: str) -> bool:
    """Whether two panels stand in one row or column of a grid."""
    specs = axes.get_subplotspec(), other.get_subplotspec()
    if None in specs or specs[0].get_gridspec() is not specs[1].get_gridspec():
        return False
    spans = [spec.rowspan if side == "y" else spec.colspan for spec in specs]
    return bool(spans[0] == spans[1])
