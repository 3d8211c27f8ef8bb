"""Integers of few bits, as tensors: wrapped to a range, and two in one byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def wrap(values: torch.Tensor, half: int = 128) -> torch.Tensor:
    """Values modulo 2 * half, in [-half, half); half is a power of two."""
    return ((values + half) & (2 * half - 1)) - half


def pair(values: torch.Tensor) -> torch.Tensor:
    """Numbers under 16, two per byte: ``[R, n]`` -> uint8 ``[R, ceil(n / 2)]``.

    The first of two has the low bits; an odd last one has a byte to itself::

        a  b  c    ->    b << 4 | a    c
    """
    import torch

    values = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).to(torch.uint8)
    return values[:, ::2] | (values[:, 1::2] << 4)


def unpair(values: torch.Tensor, num: int) -> torch.Tensor:
    """The inverse of :func:`pair`: ``[R, ceil(num / 2)]`` -> int32 ``[R, num]``."""
    import torch

    values = values.int()
    return torch.stack([values & 15, values >> 4], -1).flatten(1)[:, :num]
