"""The lossless codec: bfloat16 with its exponents recoded by channel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .array_spec import LAYER_MAJOR, U1, ArraySpec, pair, unpair, wrap
from .base import Codec, Coded, Layers, Planes, output_places

if TYPE_CHECKING:
    import torch


MIN_COUNT = 32
"""Times that an exponent must occur in the sample for ``lossless`` to learn what follows it."""


class Lossless(Codec):
    """bfloat16 to the bit, the exponent apart from sign and mantissa, which are noise.

    An exponent is coded as its distance from what usually stands there: ``base``, the median of
    its layer and channel, plus ``follow``, how far the exponent was from its own base one layer
    below -> how far it then is here. Both are fitted; all arithmetic is modulo 256, so that every
    bit pattern comes back, whatever the fit.
    """

    name = "lossless"
    fits = ("base", "follow")
    aligned = False

    @cached_property
    def planes(self) -> tuple[ArraySpec, ...]:
        half = (self.width + 1) // 2
        return (
            ArraySpec(
                "code", U1, half, LAYER_MAJOR, "two exponents a byte, 4 bits each; 15: escape"
            ),
            ArraySpec("escape", U1, self.width, LAYER_MAJOR, "zigzag code - 14 where code is 15"),
            ArraySpec("mantissa", U1, self.width, None, "sign, then the 7 bits of the mantissa"),
        )

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        rounded = hidden.to(torch.bfloat16)
        bits = rounded.view(torch.int16).int() & 0xFFFF  # [R, H]
        base = self._parameter("base", bits.device, torch.int32)[layer]
        distance = wrap(((bits >> 7) & 0xFF) - base)
        if below is None:
            residual = distance
        else:
            follow = self._parameter("follow", bits.device, torch.int32)[layer]
            residual = wrap(distance - follow[(below.state & 0xFF).long()])
        zigzag = (residual << 1) ^ (residual >> 31)  # 0..255
        narrow = zigzag.clamp_max(15)
        planes = {
            "code": pair(narrow),
            "escape": torch.where(zigzag >= 15, zigzag - 14, 0).to(torch.uint8),
            "mantissa": ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8),
        }
        return Coded(planes, rounded, distance)

    def decode(self, planes: Planes, layers: Layers, targets: np.ndarray, out: np.ndarray) -> None:
        wanted = output_places(layers)
        kernels.decode_lossless(
            planes["code"],
            planes["escape"],
            planes["mantissa"],
            self.parameters["base"],
            self.parameters["follow"],
            wanted,
            targets,
            out,
        )

    def decode_torch(self, planes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        device = planes["code"].device
        base = self._parameter("base", device, torch.int32)
        follow = self._parameter("follow", device, torch.int32)
        found = {}
        distance = torch.zeros(0)
        for layer in range(max(layers) + 1):
            narrow = unpair(planes["code"][:, layer], self.width)
            escape = planes["escape"][:, layer].int()
            zigzag = torch.where(narrow == 15, 14 + escape, narrow) & 0xFF
            residual = (zigzag >> 1) ^ -(zigzag & 1)
            if layer:
                residual = residual + follow[layer][(distance & 0xFF).long()]
            distance = wrap(residual)
            if layer in layers:
                exponent = (distance + base[layer]) & 0xFF
                sign_mantissa = planes["mantissa"][:, layer].int()
                bits = (sign_mantissa & 0x80) << 8 | exponent << 7 | sign_mantissa & 0x7F
                found[layer] = wrap(bits, 1 << 15).to(torch.int16).view(torch.bfloat16)
        return torch.stack([found[layer] for layer in layers], 1)

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``base`` ``[L, H]`` and ``follow`` ``[L, 256]``, by distance; uint8, modulo 256."""
        import torch

        bits = sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
        exponents = ((bits >> 7) & 0xFF).astype(np.int16)  # [R, L, H]
        base = np.median(exponents, axis=0).astype(np.uint8)
        distance = (exponents - base).astype(np.int8)
        follow = np.zeros((sample.shape[1], 256), np.int8)
        for layer in range(1, sample.shape[1]):
            below = distance[:, layer - 1].ravel().astype(np.int32) + 128
            here = distance[:, layer].ravel().astype(np.int32) + 128
            joint = np.bincount(below * 256 + here, minlength=1 << 16).reshape(256, 256)
            counts = joint.sum(1)
            middle = (joint.cumsum(1) * 2 < counts[:, None]).sum(1)  # medians
            known = np.flatnonzero(counts >= MIN_COUNT)
            if len(known):
                nearest = known[np.abs(np.arange(256)[:, None] - known).argmin(1)]
                follow[layer] = np.roll(middle[nearest] - 128, 128).astype(np.int8)
        return {"base": base, "follow": follow.view(np.uint8)}
