"""Arrays of codes: what a store has one Zarr array of each, and how numbers are put into them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


U1, U2 = np.dtype("u1"), np.dtype("<u2")
LAYER_MAJOR = (1, 0, 2)


@dataclass(frozen=True)
class ArraySpec:
    """One array of codes, ``[R, L, size]``.

    Attributes:
        name: of the Zarr array.
        dtype: of its values.
        size: values a row and layer.
        order: axes of (row, layer, value) as they lie in a chunk; None: uncompressed, as they are.
        meaning: one line, for the array's attributes.
    """

    name: str
    dtype: np.dtype
    size: int
    order: tuple[int, int, int] | None
    meaning: str


def allocate(
    planes: Iterable[ArraySpec], num_rows: int, num_layers: int, used: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays of a shard's codes, by name ``[num_rows, num_layers, size]``: zeros, but for the rows
    in use, each of which is to be written.

    In memory they lie in the order of chunks, so that what is written of a layer, and what is cut
    out for a chunk, is together.

    Args:
        used: rows, int64.
    """
    unused = np.ones(num_rows, bool)
    unused[used] = False
    arrays = {}
    for plane in planes:
        order = plane.order or (0, 1, 2)
        shape = (num_rows, num_layers, plane.size)
        room = np.empty([shape[axis] for axis in order], plane.dtype)
        arrays[plane.name] = room.transpose(np.argsort(order))
        arrays[plane.name][unused] = 0
    return arrays


def wrap(values: torch.Tensor, half: int = 128) -> torch.Tensor:
    """Modulo 2 * half, into [-half, half)."""
    return ((values + half) & (2 * half - 1)) - half


def pair(values: torch.Tensor) -> torch.Tensor:
    """Numbers under 16, two a byte, the first in the low bits: ``[R, n]`` -> ``[R, ceil(n/2)]``."""
    import torch

    values = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).to(torch.uint8)
    return values[:, ::2] | (values[:, 1::2] << 4)


def unpair(values: torch.Tensor, num: int) -> torch.Tensor:
    import torch

    values = values.int()
    return torch.stack([values & 15, values >> 4], -1).flatten(1)[:, :num]
