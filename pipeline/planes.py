"""Arrays of codes: what a store has one Zarr array of each, and how numbers are put into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

U1, U2 = np.dtype("u1"), np.dtype("<u2")
LAYER_MAJOR = (1, 0, 2)


@dataclass(frozen=True)
class Plane:
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

    def zeros(self, rows: int, layers: int) -> np.ndarray:
        """``[rows, layers, size]``, in memory in the order of chunks, so that what is written of a
        layer, and what is cut out of them for a chunk, lies together."""
        order = self.order or (0, 1, 2)
        shape = (rows, layers, self.size)
        return np.zeros([shape[axis] for axis in order], self.dtype).transpose(np.argsort(order))


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
