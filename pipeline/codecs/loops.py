"""How loops are compiled, and what they do not check themselves: shapes, rows and layers that
belong together.

Shapes: R rows, L layers, H width.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numba
import numpy as np


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function, and cache the code for the next process where a folder can be written.

    Nothing is checked before a division (``error_model``): a check would keep a loop from being
    vectorised.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the home directory can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


def check_shapes(
    codes: Mapping[str, np.ndarray], sizes: Mapping[str, Collection[int]], num_layers: int
) -> None:
    """Refuse codes that a loop would read beyond.

    Args:
        codes: by name; all have the rows of the first.
        sizes: values per row and layer that an array may have.
        num_layers: how many layers are read.

    Raises:
        ValueError: one has another shape.
    """
    rows = len(next(iter(codes.values())))
    for name, array in codes.items():
        fits = array.ndim == 3 and array.shape[2] in sizes[name] and array.shape[1] >= num_layers
        if not fits or len(array) != rows:
            raise ValueError(
                f"{name} is {array.shape}; expected {rows} rows of {num_layers} layers or more of "
                f"{' or '.join(map(str, sizes[name]))} values"
            )


def check_fitted(parameters: Mapping[str, np.ndarray], num_layers: int, width: int) -> None:
    """Refuse fitted arrays ``[L, width]`` of another width, or of fewer layers than are read.

    Raises:
        ValueError: one has another shape.
    """
    for name, array in parameters.items():
        if array.shape[1:] != (width,) or len(array) < num_layers:
            raise ValueError(
                f"{name} is {array.shape}; expected {num_layers} layers or more of {width}"
            )


def check_output(
    targets: np.ndarray, slots: np.ndarray, out: np.ndarray, rows: int, width: int
) -> None:
    """Refuse rows and layers of the output that are not there.

    Args:
        targets, slots: as for :meth:`semroute.pipeline.codecs.base.Codec.decode`, and of
            :func:`semroute.pipeline.codecs.base.output_slots`.
        rows, width: of what is written.

    Raises:
        ValueError: a row, layer or width is not that of ``out``.
    """
    if out.ndim != 3 or out.shape[2] != width or len(targets) != rows:
        raise ValueError(
            f"out is {out.shape} for {len(targets)} rows; expected {rows} rows of {width} values"
        )
    for name, places, first, num in (
        ("rows", targets, 0, len(out)),
        ("layers", slots, -1, out.shape[1]),
    ):
        if len(places) and not (places.min() >= first and places.max() < num):
            raise ValueError(f"{name} {places.min()} to {places.max()} are not among {num}")


def code_sizes(width: int) -> tuple[int, int]:
    """Bytes of the codes of one row and layer: of 8, or of 4 bits each."""
    return width, -(-width // 2)


def check_predictive(
    code: np.ndarray,
    escape: np.ndarray,
    scalar: np.ndarray,
    scales: np.ndarray,
    width: int,
    num_layers: int,
) -> None:
    """Refuse codes of ``delta`` and ``linear`` that a loop would read beyond.

    Raises:
        ValueError: one has another shape.
    """
    codes = {"code": code, "escape": escape, "scalar": scalar}
    sizes = {"code": code_sizes(width), "escape": (width,), "scalar": (5,)}
    check_shapes(codes, sizes, num_layers)
    if scales.shape != (256,) or scalar.dtype != np.uint8:
        raise ValueError(f"{scales.shape} scales for numbers of {scalar.dtype}; expected 256")
