"""The widget: JavaScript asks, Python answers. It needs no network."""

import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import traitlets
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ...pipeline.style import COLOUR_MAP, SIGNED_COLOUR_MAP
from ...schemas import InputError
from ...schemas.escaping import shown

if TYPE_CHECKING:
    from .sides import Side

_HERE = Path(__file__).parent


class Explorer(anywidget.AnyWidget):
    """One or two stores or runs side by side, as :func:`semroute.explore` shows them.

    Attributes:
        sides: what is shown.
    """

    _esm = _HERE / "explorer.js"
    _css = _HERE / "explorer.css"
    facts: Any = traitlets.List().tag(sync=True)
    colours: Any = traitlets.Dict().tag(sync=True)

    def __init__(self, sides: "Sequence[Side]") -> None:
        self.sides = [*sides]
        names = {"plain": COLOUR_MAP, "signed": SIGNED_COLOUR_MAP}
        super().__init__(
            facts=[side.facts() for side in sides],
            colours={kind: _hex_colours(name) for kind, name in names.items()},
        )
        self.on_msg(self._answer)

    def __repr__(self) -> str:
        titles = [(side["run"] or side["features"])["title"] for side in self.facts]
        return f"Explorer of {' and '.join(titles)}: Jupyter shows it"

    def _answer(self, _widget: Any, question: Mapping[str, Any], _buffers: Any) -> None:
        """Answer one message of JavaScript by one with the same number."""
        try:
            side = self.sides[question["side"]]
            answer = side.answer(question["ask"], question["arguments"])
        except (InputError, OSError) as error:
            self.send({"number": question["number"], "error": shown(error)})
        except Exception as error:
            traceback.print_exc()
            self.send({"number": question["number"], "error": f"{type(error).__name__}: {error}"})
        else:
            message, buffers = pack_answer(answer)
            self.send({"number": question["number"], **message}, buffers)


def pack_answer(answer: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """An answer as plain JSON, with arrays (as float32) and files beside it.

    Returns:
        ``plain``, what is neither, and ``binary``, name and shape of each buffer, with None as the
        shape of a file; and the buffers.
    """
    plain: dict[str, Any] = {}
    binary: list[dict[str, Any]] = []
    buffers: list[bytes] = []
    for name, value in answer.items():
        if isinstance(value, np.ndarray):
            binary.append({"name": name, "shape": [*value.shape]})
            buffers.append(np.ascontiguousarray(value, "<f4").tobytes())
        elif isinstance(value, bytes):
            binary.append({"name": name, "shape": None})
            buffers.append(value)
        else:
            plain[name] = value
    return {"plain": plain, "binary": binary}, buffers


def _hex_colours(name: str) -> list[str]:
    return [to_hex(colour) for colour in colormaps[name](np.linspace(0, 1, 256))]
