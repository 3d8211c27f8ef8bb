"""The lossless codec: bfloat16 with its exponents recoded by channel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .base import LAYER_MAJOR, U1, ArraySpec, CodeArrays, Codec, Coded, Layers, output_slots
from .bits import pair, unpair, wrap

if TYPE_CHECKING:
    import torch

MIN_COUNT = 32
"""How often a distance must occur in the sample for ``lossless`` to learn what follows it."""


class Lossless(Codec):
    """bfloat16 to the bit; the exponent is coded apart from sign and mantissa, which are noise::

        bfloat16   s eeeeeeee mmmmmmm
        mantissa   s          mmmmmmm
        distance     eeeeeeee - base of its layer and channel
        residual     distance - follow of the distance one layer below

    ``base`` is the median exponent of a layer and channel. ``follow`` maps the distance of the
    exponent one layer below to the distance to expect here. Both are fitted; all arithmetic is
    modulo 256, so that every bit pattern comes back, whatever the fit.
    """

    name = "lossless"
    fits = True
    aligned = False

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
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
        codes = {
            "code": pair(narrow),
            "escape": torch.where(zigzag >= 15, zigzag - 14, 0).to(torch.uint8),
            "mantissa": ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8),
        }
        return Coded(codes, rounded, distance)

    def decode(
        self, codes: CodeArrays, layers: Layers, targets: np.ndarray, out: np.ndarray
    ) -> None:
        kernels.decode_lossless(
            codes["code"],
            codes["escape"],
            codes["mantissa"],
            self.parameters["base"],
            self.parameters["follow"],
            output_slots(layers),
            targets,
            out,
        )

    def decode_torch(self, codes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        device = codes["code"].device
        base = self._parameter("base", device, torch.int32)
        follow = self._parameter("follow", device, torch.int32)
        decoded = {}
        distance = torch.zeros(0)
        for layer in range(max(layers) + 1):
            narrow = unpair(codes["code"][:, layer], self.width)
            escape = codes["escape"][:, layer].int()
            zigzag = torch.where(narrow == 15, 14 + escape, narrow) & 0xFF
            residual = (zigzag >> 1) ^ -(zigzag & 1)
            if layer:
                residual = residual + follow[layer][(distance & 0xFF).long()]
            distance = wrap(residual)
            if layer in layers:
                exponent = (distance + base[layer]) & 0xFF
                sign_mantissa = codes["mantissa"][:, layer].int()
                bits = (sign_mantissa & 0x80) << 8 | exponent << 7 | sign_mantissa & 0x7F
                decoded[layer] = wrap(bits, 1 << 15).to(torch.int16).view(torch.bfloat16)
        return torch.stack([decoded[layer] for layer in layers], 1)

    @classmethod
    def fitted(cls, width: int, rank: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"base": ((width,), U1), "follow": ((256,), U1)}

    @classmethod
    def fit(cls, sample: torch.Tensor, rank: int) -> dict[str, np.ndarray]:
        """``base`` ``[L, H]`` and ``follow`` ``[L, 256]``, by distance; uint8, modulo 256."""
        import torch

        bits = sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(np.uint16)
        exponents = ((bits >> 7) & 0xFF).astype(np.int16)  # [R, L, H]
        base = np.median(exponents, axis=0).astype(np.uint8)
        distance = (exponents - base).astype(np.int8)
        follow = np.zeros((sample.shape[1], 256), np.int8)
        for layer in range(1, sample.shape[1]):
            # Counts of (below, here) over rows and channels, distances moved to 0..255.
            below = distance[:, layer - 1].ravel().astype(np.int32) + 128
            here = distance[:, layer].ravel().astype(np.int32) + 128
            joint = np.bincount(below * 256 + here, minlength=1 << 16).reshape(256, 256)
            counts = joint.sum(1)
            middle = (joint.cumsum(1) * 2 < counts[:, None]).sum(1)  # median ``here`` of each below
            known = np.flatnonzero(counts >= MIN_COUNT)
            if len(known):  # a rare distance is followed by what follows the nearest known one
                nearest = known[np.abs(np.arange(256)[:, None] - known).argmin(1)]
                # From -128, ..., 127 to the order of unsigned bytes: 0, ..., 127, -128, ..., -1.
                follow[layer] = np.roll(middle[nearest] - 128, 128).astype(np.int8)
        return {"base": base, "follow": follow.view(np.uint8)}
