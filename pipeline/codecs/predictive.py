"""Lossy codecs that store the difference to a prediction from the layer below: delta and linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import kernels
from .array_spec import LAYER_MAJOR, U1, U2, ArraySpec, pair, unpair, wrap
from .base import (
    LN_EPS,
    NUM_MASSIVE,
    Codec,
    Coded,
    Layers,
    Planes,
    output_places,
    pairs_of_layers,
    robust_rms,
)

if TYPE_CHECKING:
    import torch


RIDGE = 3e-3
"""Of the matrices of ``linear``, times the mean diagonal; 1e-4 to 1e-2 gave the same bits."""
MAX_CODE = 32_767
"""Codes are int16 before they are split; a larger one widens its vector's step instead."""
LOWEST_SCALE = 24
"""Scales are 2**(k / 8 - LOWEST_SCALE) for k in 0..255."""
SCALES = np.exp2(np.arange(256) / 8 - LOWEST_SCALE).astype(np.float32)


class Predictive(Codec):
    """LN(h) predicted from the layer below, the residual on a uniform step.

    ``LN(h) = (h - mean) / deviation``, deviation = sqrt(var + 1e-5), both kept in bfloat16 so that
    h itself comes back. A vector's step is 2**-quality times its RMS without its 8 largest
    channels, on a scale of 8 steps an octave. Codes that do not fit their 4 or 8 bits have an
    escape, so that none is ever clipped.

    Two codes of 4 bits share a byte: Huffman coding, which is all that zstd can do with noise,
    wastes bits on alphabets of few symbols.
    """

    @cached_property
    def planes(self) -> tuple[ArraySpec, ...]:
        codes = {8: "zigzag code, 255: escape", 4: "two zigzag codes a byte, 15: escape"}
        return (
            ArraySpec("code", U1, -(-self.width * self.code_bits // 8), LAYER_MAJOR,
                  codes[self.code_bits]),
            ArraySpec("escape", U2, self.width, LAYER_MAJOR,
                      f"zigzag code - {self._limit - 1} where code is {self._limit}"),
            ArraySpec("scalar", U1, 5, (2, 1, 0),
                      "bfloat16 mean, bfloat16 deviation, scale number"),
        )  # fmt: skip

    @property
    def _limit(self) -> int:
        """The code that says escape."""
        return 2**self.code_bits - 1

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        hidden = hidden.float()
        exact = hidden.mean(-1, keepdim=True)  # [R, 1]
        variance = (hidden - exact).square().mean(-1, keepdim=True)  # torch.var is far slower
        mean = exact.to(torch.bfloat16)
        deviation = (variance + LN_EPS).sqrt().to(torch.bfloat16)
        normed = (hidden - mean.float()) / deviation.float()
        predicted = self._predict(layer, below)
        residual = self._turn(layer, normed - predicted)
        needed = torch.maximum(
            robust_rms(normed)[:, None] * 2.0**-self._quality,
            residual.abs().amax(-1, keepdim=True) / (MAX_CODE / 2**0.0625 - 1),
        )
        needed = needed.nan_to_num(nan=1.0)  # refused later, by who asks whether all is finite
        number = (8 * (needed.clamp_min(1e-30).log2() + LOWEST_SCALE)).round().clamp(0, 255).int()
        scale = torch.from_numpy(SCALES).to(hidden.device)[number.long()]  # [R, 1]
        codes = (residual / scale).round().clamp(-MAX_CODE, MAX_CODE)
        state = predicted + self._turn_back(layer, codes * scale)
        zigzag = codes.int()
        zigzag = (zigzag << 1) ^ (zigzag >> 31)
        low = zigzag.clamp_max(self._limit)
        scalars = torch.cat([mean, deviation], 1).view(torch.uint8)  # little-endian, [R, 4]
        escape = torch.where(zigzag >= self._limit, zigzag - (self._limit - 1), 0)
        planes = {
            "code": low.to(torch.uint8) if self.code_bits == 8 else pair(low),
            "escape": wrap(escape, 1 << 15).to(torch.int16).view(torch.uint16),
            "scalar": torch.cat([scalars, number.to(torch.uint8)], 1),
        }
        decoded = state * deviation.float() + mean.float()
        return Coded(planes, decoded.to(torch.bfloat16), state)

    @property
    def _quality(self) -> float:
        assert self.quality is not None
        return self.quality

    @abstractmethod
    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        """LN(h) of a layer from what a reader has of the layer below, fp32 ``[R or 1, H]``."""

    def _turn(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """The residual in the basis that is coded."""
        return residual

    def _turn_back(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """And back."""
        return residual

    def decode_torch(self, planes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        device = planes["code"].device
        scales = torch.from_numpy(SCALES).to(device)
        found = {}
        below: Coded | None = None
        for layer in range(max(layers) + 1):
            code = planes["code"][:, layer]
            low = code.int() if self.code_bits == 8 else unpair(code, self.width)
            escape = planes["escape"][:, layer].view(torch.int16).int() & 0xFFFF
            zigzag = torch.where(low == self._limit, self._limit - 1 + escape, low)
            codes = ((zigzag >> 1) ^ -(zigzag & 1)).float()
            scalar = planes["scalar"][:, layer]
            scale = scales[scalar[:, 4:].long()]
            state = self._predict(layer, below) + self._turn_back(layer, codes * scale)
            below = Coded({}, state, state)
            if layer in layers:
                words = scalar[:, 1:4:2].int() << 8 | scalar[:, 0:4:2].int()
                both = wrap(words, 1 << 15).to(torch.int16).view(torch.bfloat16).float()
                mean, deviation = both.split(1, 1)
                found[layer] = (state * deviation + mean).to(torch.bfloat16)
        return torch.stack([found[layer] for layer in layers], 1)


class Delta(Predictive):
    """Predicted by a slope and a bias a channel."""

    name = "delta"
    fits = ("slope", "bias")

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """On a CPU by a compiled loop: sums in another order, and else the same arithmetic."""
        import torch

        if hidden.device.type != "cpu":
            return super().encode(layer, hidden, below)
        values = hidden.float().contiguous().numpy()
        before = values[:0] if below is None else below.state.numpy()
        codes = {
            plane.name: np.empty((len(values), plane.size), plane.dtype) for plane in self.planes
        }
        state, decoded = np.empty_like(values), np.empty(values.shape, np.uint16)

        def part(rows: slice) -> None:
            kernels.encode_delta(
                values[rows],
                before[rows],
                self.parameters["slope"][layer],
                self.parameters["bias"][layer],
                SCALES,
                2.0**-self._quality,
                min(NUM_MASSIVE, self.width // 2),
                LN_EPS,
                *(codes[name][rows] for name in ("code", "escape", "scalar")),
                state[rows],
                decoded[rows],
            )

        kernels.in_parts(part, len(values))
        planes = {name: torch.from_numpy(array) for name, array in codes.items()}
        hidden = torch.from_numpy(decoded).view(torch.bfloat16)
        return Coded(planes, hidden, torch.from_numpy(state))

    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        import torch

        device = torch.device("cpu") if below is None else below.state.device
        bias = self._parameter("bias", device, torch.float32)[layer]
        if below is None:
            return bias
        return below.state * self._parameter("slope", device, torch.float32)[layer] + bias

    def decode(self, planes: Planes, layers: Layers, targets: np.ndarray, out: np.ndarray) -> None:
        kernels.decode_delta(
            planes["code"],
            planes["escape"],
            planes["scalar"],
            SCALES,
            self.parameters["slope"],
            self.parameters["bias"],
            output_places(layers),
            targets,
            out,
        )

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``slope`` and ``bias``, float32 ``[L, H]``: least squares, weighted by 1 / RMS**2."""
        import torch

        slopes, biases = [], []
        for weight, x, y in pairs_of_layers(sample):
            mean_x, mean_y = _average(weight, x), _average(weight, y)
            x, y = x - mean_x, y - mean_y
            slope = (weight * x * y).sum(0) / ((weight * x * x).sum(0) + 1e-6)
            slopes.append(slope)
            biases.append(mean_y - slope * mean_x)
        return {
            "slope": torch.stack(slopes).cpu().numpy(),
            "bias": torch.stack(biases).cpu().numpy(),
        }


class Linear(Predictive):
    """Predicted by a matrix and a bias a layer; the residual turned to its principal axes.

    ``LN(h_l) = LN(h_(l-1)) @ matrix_l + bias_l + (codes * scale) @ rotation_l``. The rotation
    (Karhunen-Loève) takes out what is left of correlation between channels, and puts the large
    codes first, where they are wide. Decoding is two matrix products a layer.
    """

    name = "linear"
    fits = ("matrix", "rotation", "bias")
    matrices = True

    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        import torch

        device = torch.device("cpu") if below is None else below.state.device
        bias = self._parameter("bias", device, torch.float32)[layer]
        if below is None:
            return bias
        return below.state @ self._parameter("matrix", device, torch.float32)[layer] + bias

    def _turn(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        import torch

        return residual @ self._parameter("rotation", residual.device, torch.float32)[layer].T

    def _turn_back(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        import torch

        return residual @ self._parameter("rotation", residual.device, torch.float32)[layer]

    @cached_property
    def _matrices(self) -> tuple[np.ndarray, np.ndarray]:
        bits = (self.parameters["matrix"], self.parameters["rotation"])
        matrix, rotation = ((array.astype(np.uint32) << 16).view(np.float32) for array in bits)
        return matrix, rotation

    def decode(self, planes: Planes, layers: Layers, targets: np.ndarray, out: np.ndarray) -> None:
        matrix, rotation = self._matrices
        wanted = output_places(layers)
        state = np.zeros((len(targets), self.width), np.float32)
        residual = np.empty_like(state)
        for layer in range(len(wanted)):
            kernels.decode_codes(
                planes["code"],
                planes["escape"],
                planes["scalar"],
                layer,
                SCALES,
                residual,
            )
            below = state @ matrix[layer] if layer else np.float32(0)
            state = residual @ rotation[layer] + below + self.parameters["bias"][layer]
            if wanted[layer] >= 0:
                kernels.denormalise(state, planes["scalar"], layer, wanted[layer], targets, out)

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``matrix``, ``rotation``: bits of bfloat16 ``[L, H, H]``; ``bias``: float32 ``[L, H]``.

        Ridge regression weighted by 1 / RMS**2, and the eigenvectors of what it leaves.
        """
        import torch

        matrices, rotations, biases = [], [], []
        for weight, x, y in pairs_of_layers(sample):
            mean_x, mean_y = _average(weight, x), _average(weight, y)
            centred = x - mean_x
            gram = ((centred * weight).T @ centred).double()
            gram += (RIDGE * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram)).to(gram)
            cross = ((centred * weight).T @ (y - mean_y)).double()
            matrix = torch.linalg.solve(gram, cross).bfloat16()
            bias = mean_y - mean_x @ matrix.float()
            left = (y - x @ matrix.float() - bias) * weight.sqrt()
            axes = torch.linalg.eigh((left.T @ left).double()).eigenvectors  # ascending
            matrices.append(matrix)
            rotations.append(axes.flip(1).T.bfloat16())
            biases.append(bias)
        return {
            "matrix": torch.stack(matrices).view(torch.uint16).cpu().numpy(),
            "rotation": torch.stack(rotations).view(torch.uint16).cpu().numpy(),
            "bias": torch.stack(biases).cpu().numpy(),
        }


def _average(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (weight * values).sum(0) / weight.sum()
