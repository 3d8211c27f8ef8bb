"""How loops are compiled and run in threads, and what they do not check: shapes, rows and
layers that belong together.

Compiled code is cached on disk where a folder can be written. It releases the GIL. Shapes: R rows,
L layers, H width.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np

MIN_PART_ROWS = 64
"""Fewest rows that are worth a thread."""


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function, and cache the code for the next process where a folder can be written.

    Nothing is checked before a division (``error_model``): a check would keep a loop from being
    vectorised.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the home directory can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


def summing(function: Callable[..., Any]) -> Any:
    """Compile a sum in any order, and so vectorised; of NaN the result is undefined."""
    return compiled(function, fastmath={"reassoc", "nsz", "nnan"})


def adding(function: Callable[..., Any]) -> Any:
    """Compile a sum of products in any order, with fused multiplications and additions: exact for
    integers whose sums are below 2**24, so that the order cannot be seen."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def in_parts(function: Callable[[slice], None], num_rows: int) -> None:
    """Call a compiled loop for slices of all rows, in as many threads as torch would use."""
    import torch

    parts = max(1, min(torch.get_num_threads(), num_rows // MIN_PART_ROWS))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    slices = [slice(*pair) for pair in pairwise(bounds)]
    if parts == 1:
        function(slices[0])
        return
    for _ in _threads(torch.get_num_threads()).map(function, slices):
        pass


@lru_cache(maxsize=1)
def _threads(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num)


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


def check_fitted(name: str, array: np.ndarray, num_layers: int, shape: tuple[int, ...]) -> None:
    """Refuse a fitted array ``[L, *shape]`` of another shape, or of fewer layers than are read.

    Raises:
        ValueError: it has another shape.
    """
    if array.shape[1:] != shape or len(array) < num_layers:
        raise ValueError(
            f"{name} is {array.shape}; expected {num_layers} layers or more of {shape}"
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


class Scales(NamedTuple):
    """Sizes by the number of a vector's scale, float32 ``[256]`` each.

    Attributes:
        scales: of a step of its codes.
        units, inverses: of a step in which the layer above reads it, and 1 over it.
    """

    scales: np.ndarray
    units: np.ndarray
    inverses: np.ndarray


class Prediction(NamedTuple):
    """Fitted arrays as loops read them, float32; L layers, r axes.

    Attributes:
        slope, bias, gain: ``[L, H]``.
        down: ``[L, r, H]``; r is a multiple of 4, and 0 beside a whole matrix.
        shrink: ``[L, r]``.
        up: ``[L, r, H]``, or ``[L, H, H]``, the whole matrix.
        rotation: ``[L, H, H]`` beside a whole matrix, else ``[L, 0, H]``.
    """

    slope: np.ndarray
    bias: np.ndarray
    down: np.ndarray
    shrink: np.ndarray
    up: np.ndarray
    gain: np.ndarray
    rotation: np.ndarray


def check_scales(scales: Scales, scalar: np.ndarray) -> None:
    """Refuse sizes that do not have one value for each number.

    Raises:
        ValueError: there are others.
    """
    shapes = {array.shape for array in scales}
    if shapes != {(256,)} or scalar.dtype != np.uint8:
        raise ValueError(f"{shapes} scales for numbers of {scalar.dtype}; expected 256")


def check_prediction(prediction: Prediction, num_layers: int, width: int) -> None:
    """Refuse fitted arrays that do not belong together, or have fewer layers than are read.

    Raises:
        ValueError: one has another shape.
    """
    rank, num_axes = prediction.down.shape[1], prediction.rotation.shape[1]
    expected = {
        **dict.fromkeys(("slope", "bias", "gain"), (width,)),
        "shrink": (rank,),
        "down": (rank, width),
        "up": (width if num_axes else rank, width),
        "rotation": (width if num_axes else 0, width),
    }
    for name, shape in expected.items():
        check_fitted(name, getattr(prediction, name), num_layers, shape)
    if rank % 4 or (rank and num_axes):
        raise ValueError(f"{rank} axes; expected a multiple of 4, and none beside a whole matrix")
