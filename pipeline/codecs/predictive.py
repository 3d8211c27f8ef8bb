"""Lossy codecs that store the difference to a prediction from the layer below: delta and linear."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import LN_EPS
from . import kernels
from .base import (
    F4,
    LAYER_MAJOR,
    U1,
    U2,
    ArraySpec,
    CodeArrays,
    Coded,
    Layers,
    Lossy,
    layer_norm,
)
from .bits import pair, unpair, wrap

if TYPE_CHECKING:
    import torch

NUM_MASSIVE = 8
"""Channels left out of the RMS that scales a vector's step: with them in, one massive activation
makes the step of all ordinary channels coarse."""
RIDGE = 3e-3
"""Ridge of the matrices of ``linear``, times the mean diagonal; 1e-4 to 1e-2 gave the same bits."""
MAX_CODE = 32_767
"""Codes are int16 before they are split; a larger one widens its vector's step instead."""
LOWEST_SCALE = 24
"""Scales are 2**(k / 8 - LOWEST_SCALE) for k in 0..255."""
SCALES = np.exp2(np.arange(256) / 8 - LOWEST_SCALE).astype(np.float32)


class Predictive(Lossy):
    """LN(h) predicted from the layer below, the residual rounded to uniform steps.

    ``LN(h) = (h - mean) / deviation``, deviation = sqrt(var + 1e-5), both kept in bfloat16 so that
    h itself comes back. A vector's step is 2**-quality times its RMS without its 8 largest
    channels, on a scale with 8 steps per octave. Codes that do not fit their 4 or 8 bits have an
    escape, so that none is ever clipped.

    Two codes of 4 bits share a byte: Huffman coding, which is all that zstd can do with noise,
    wastes bits on alphabets of few symbols.

    From residual to bytes, with codes of 4 bits (15 is the escape)::

        residual / step, rounded     0  -1   2  -9
        zigzag                       0   1   4  17
        code                         0   1   4  15    two per byte
        escape                       0   0   0   3    zigzag - 14 where the code is 15
    """

    @cached_property
    def code_arrays(self) -> tuple[ArraySpec, ...]:
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
        """The code that marks an escape."""
        return 2**self.code_bits - 1

    def encode_layer(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        hidden = hidden.float()
        exact = hidden.mean(-1, keepdim=True)  # [R, 1]
        variance = (hidden - exact).square().mean(-1, keepdim=True)  # torch.var is far slower
        mean = exact.to(torch.bfloat16)
        deviation = (variance + LN_EPS).sqrt().to(torch.bfloat16)
        normed = (hidden - mean.float()) / deviation.float()
        predicted = self._predict(layer, below)
        residual = self._rotate(layer, normed - predicted)
        needed = torch.maximum(
            _robust_rms(normed)[:, None] * 2.0**-self._quality,
            residual.abs().amax(-1, keepdim=True) / (MAX_CODE / 2**0.0625 - 1),
        )
        needed = needed.nan_to_num(nan=1.0)  # refused later, by the check that all is finite
        number = (8 * (needed.clamp_min(1e-30).log2() + LOWEST_SCALE)).round().clamp(0, 255).int()
        scale = torch.from_numpy(SCALES).to(hidden.device)[number.long()]  # [R, 1]
        steps = (residual / scale).round().clamp(-MAX_CODE, MAX_CODE)
        state = predicted + self._rotate_back(layer, steps * scale)
        signed = steps.int()
        zigzag = (signed << 1) ^ (signed >> 31)
        low = zigzag.clamp_max(self._limit)
        scalars = torch.cat([mean, deviation], 1).view(torch.uint8)  # little-endian, [R, 4]
        escape = torch.where(zigzag >= self._limit, zigzag - (self._limit - 1), 0)
        codes = {
            "code": low.to(torch.uint8) if self.code_bits == 8 else pair(low),
            "escape": wrap(escape, 1 << 15).to(torch.int16).view(torch.uint16),
            "scalar": torch.cat([scalars, number.to(torch.uint8)], 1),
        }
        decoded = state * deviation.float() + mean.float()
        return Coded(codes, decoded.to(torch.bfloat16), state)

    @property
    def _quality(self) -> float:
        assert self.quality is not None
        return self.quality

    @abstractmethod
    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        """LN(h) of a layer from what a reader has of the layer below, fp32 ``[R or 1, H]``."""

    def _rotate(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """The residual in the basis in which it is coded."""
        return residual

    def _rotate_back(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`_rotate`."""
        return residual

    def decode_layers_torch(
        self, codes: Mapping[str, torch.Tensor], layers: Layers
    ) -> torch.Tensor:
        import torch

        device = codes["code"].device
        scales = torch.from_numpy(SCALES).to(device)
        decoded = {}
        below: Coded | None = None
        for layer in range(max(layers) + 1):
            code = codes["code"][:, layer]
            low = code.int() if self.code_bits == 8 else unpair(code, self.width)
            escape = codes["escape"][:, layer].view(torch.int16).int() & 0xFFFF
            zigzag = torch.where(low == self._limit, self._limit - 1 + escape, low)
            steps = ((zigzag >> 1) ^ -(zigzag & 1)).float()
            scalar = codes["scalar"][:, layer]
            scale = scales[scalar[:, 4:].long()]
            state = self._predict(layer, below) + self._rotate_back(layer, steps * scale)
            below = Coded({}, state, state)
            if layer in layers:
                words = scalar[:, 1:4:2].int() << 8 | scalar[:, 0:4:2].int()
                both = wrap(words, 1 << 15).to(torch.int16).view(torch.bfloat16).float()
                mean, deviation = both.split(1, 1)
                decoded[layer] = (state * deviation + mean).to(torch.bfloat16)
        return torch.stack([decoded[layer] for layer in layers], 1)


class Delta(Predictive):
    """Prediction by one slope and one bias per channel."""

    name = "delta"
    fits = ("slope", "bias")

    def encode_layer(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """On a CPU a compiled loop: the same arithmetic, but sums in another order."""
        import torch

        if hidden.device.type != "cpu":
            return super().encode_layer(layer, hidden, below)
        values = hidden.float().contiguous().numpy()
        before = values[:0] if below is None else below.state.numpy()
        codes = {
            spec.name: np.empty((len(values), spec.size), spec.dtype) for spec in self.code_arrays
        }
        state, decoded = np.empty_like(values), np.empty(values.shape, np.uint16)

        def encode_part(rows: slice) -> None:
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

        kernels.in_parts(encode_part, len(values))
        tensors = {name: torch.from_numpy(array) for name, array in codes.items()}
        hidden = torch.from_numpy(decoded).view(torch.bfloat16)
        return Coded(tensors, hidden, torch.from_numpy(state))

    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        import torch

        device = torch.device("cpu") if below is None else below.state.device
        bias = self._parameter("bias", device, torch.float32)[layer]
        if below is None:
            return bias
        return below.state * self._parameter("slope", device, torch.float32)[layer] + bias

    def decode_layers(
        self, codes: CodeArrays, slots: np.ndarray, targets: np.ndarray, out: np.ndarray
    ) -> None:
        kernels.decode_delta(
            codes["code"],
            codes["escape"],
            codes["scalar"],
            SCALES,
            self.parameters["slope"],
            self.parameters["bias"],
            slots,
            targets,
            out,
        )

    @classmethod
    def fitted(cls, width: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"slope": ((width,), F4), "bias": ((width,), F4)}

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``slope`` and ``bias``, float32 ``[L, H]``: least squares, weighted by 1 / RMS**2."""
        import torch

        slopes, biases = [], []
        for weight, x, y in _regressions(sample):
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
    """Prediction by one matrix and bias per layer; the residual rotated to its principal axes.

    ``LN(h_l) = LN(h_(l-1)) @ matrix_l + bias_l + (codes * scale) @ rotation_l``. The rotation
    (Karhunen-Loève) removes the correlation that is left between channels, and puts the
    largest codes first. Decoding is two matrix products per layer.
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

    def _rotate(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        import torch

        return residual @ self._parameter("rotation", residual.device, torch.float32)[layer].T

    def _rotate_back(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        import torch

        return residual @ self._parameter("rotation", residual.device, torch.float32)[layer]

    @cached_property
    def _matrices(self) -> tuple[np.ndarray, np.ndarray]:
        bits = (self.parameters["matrix"], self.parameters["rotation"])
        matrix, rotation = ((array.astype(np.uint32) << 16).view(np.float32) for array in bits)
        return matrix, rotation

    def decode_layers(
        self, codes: CodeArrays, slots: np.ndarray, targets: np.ndarray, out: np.ndarray
    ) -> None:
        matrix, rotation = self._matrices
        state = np.zeros((len(targets), self.width), np.float32)
        residual = np.empty_like(state)
        for layer in range(len(slots)):
            kernels.decode_codes(
                codes["code"],
                codes["escape"],
                codes["scalar"],
                layer,
                SCALES,
                residual,
            )
            below = state @ matrix[layer] if layer else np.float32(0)
            state = residual @ rotation[layer] + below + self.parameters["bias"][layer]
            if slots[layer] >= 0:
                kernels.denormalise(state, codes["scalar"], layer, slots[layer], targets, out)

    @classmethod
    def fitted(cls, width: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            "matrix": ((width, width), U2),
            "rotation": ((width, width), U2),
            "bias": ((width,), F4),
        }

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``matrix``, ``rotation``: bits of bfloat16 ``[L, H, H]``; ``bias``: float32 ``[L, H]``.

        Ridge regression weighted by 1 / RMS**2, and the eigenvectors of its residual.
        """
        import torch

        matrices, rotations, biases = [], [], []
        for weight, x, y in _regressions(sample):
            mean_x, mean_y = _average(weight, x), _average(weight, y)
            centred = x - mean_x
            gram = ((centred * weight).T @ centred).double()
            gram += (RIDGE * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram)).to(gram)
            cross = ((centred * weight).T @ (y - mean_y)).double()
            matrix = torch.linalg.solve(gram, cross).bfloat16()
            bias = mean_y - mean_x @ matrix.float()
            rest = (y - x @ matrix.float() - bias) * weight.sqrt()
            axes = torch.linalg.eigh((rest.T @ rest).double()).eigenvectors  # ascending
            matrices.append(matrix)
            rotations.append(axes.flip(1).T.bfloat16())
            biases.append(bias)
        return {
            "matrix": torch.stack(matrices).view(torch.uint16).cpu().numpy(),
            "rotation": torch.stack(rotations).view(torch.uint16).cpu().numpy(),
            "bias": torch.stack(biases).cpu().numpy(),
        }


def _robust_rms(normed: torch.Tensor) -> torch.Tensor:
    """RMS over the last axis without its 8 largest channels: ``[..., H]`` -> ``[...]``."""
    squares = normed.square()
    num = min(NUM_MASSIVE, squares.shape[-1] // 2)
    rest = squares.sum(-1) - squares.topk(num, dim=-1).values.sum(-1)
    return (rest.clamp_min(0) / (squares.shape[-1] - num)).sqrt()


def _regressions(
    sample: torch.Tensor,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By layer: weights ``[R, 1]``, and LN(h) of the layer below (zeros for the first) and of it.

    Both ``[R, H]``: the second is to be predicted from the first.
    """
    import torch

    below: torch.Tensor | None = None
    for layer in range(sample.shape[1]):
        normed = layer_norm(sample[:, layer])
        weight = _robust_rms(normed).clamp_min(1e-3)[:, None] ** -2
        yield weight, torch.zeros_like(normed) if below is None else below, normed
        below = normed


def _average(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (weight * values).sum(0) / weight.sum()
