"""What every figure must have."""

from typing import Any


def untitled(figure: Any) -> list[str]:
    """Axes with ticks whose titles are missing; a title may be the figure's, or of axes that share
    theirs."""
    missing = []
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.axison]
    for axes in shown:
        for side in "xy":
            get = f"get_{side}label"
            shared = getattr(axes, f"get_shared_{side}_axes")().get_siblings(axes)
            ticks = [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]
            if not any(ticks) or any(getattr(other, get)() for other in shared):
                continue
            if not getattr(figure, f"get_sup{side}label")():
                missing.append(f"{side} of {axes.get_title() or axes.get_label()!r}")
    return missing
