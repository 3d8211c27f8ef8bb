"""The lossy codec that stores the difference to a prediction from the layer below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import DEFAULT_RANK, LN_EPS
from ...schemas.seeds import Purpose, torch_generator
from . import kernels
from .base import (
    F4,
    I1,
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
from .loops import Prediction, Scales, in_parts

if TYPE_CHECKING:
    import torch

NUM_MASSIVE = 8
"""Channels left out of the RMS that scales a vector's step: with them in, one massive activation
makes the step of all ordinary channels coarse."""
RIDGE = 3e-3
"""Ridge of regressions, times the mean diagonal; 1e-4 to 1e-2 gave the same bits."""
SPARE_AXES, POWERS = 16, 4
"""Subspace iteration (Halko et al. 2011): axes beside those that are wanted, and rounds."""
MAX_CODE = 32_767
"""Codes are int16 before they are split; a larger one widens its vector's step instead."""
LOWEST_SCALE = 24
"""Scales are 2**(k / 8 - LOWEST_SCALE) for k in 0..255."""
SCALES = np.exp2(np.arange(256) / 8 - LOWEST_SCALE).astype(np.float32)
UNITS = 16
"""Units to the RMS of a vector, in which matrices read it."""
MAX_UNITS = 127
"""Largest entry of a vector or matrix whose products are summed; others are clipped."""
EXACT_SUM = 2**24
"""Below this, sums of integers in float32 are exact, whatever their order."""
MAX_DEVIATIONS = 6.0
"""Standard deviations of an axis that ``MAX_UNITS`` stand for."""


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

    The prediction has a rank r. With x the layer below, its unit a sixteenth of its RMS, and
    ``int()`` rounding to -127..127::

        r = 0, ``delta``     slope * x + bias
        0 < r < H            slope * x + bias + (int(int(x / unit) @ down.T * shrink) @ up) * gain * unit
        r = H, ``linear``    x @ matrix + bias, and the residual rotated to its principal axes

    In between, only integers are multiplied and summed, and every sum is below 2**24. So float32
    has them exactly, whatever the order, fused or not: a CPU, a GPU (TF32 and bfloat16 included)
    and the encoder agree to the bit. Products of ``linear`` round as the library likes.
    """  # noqa: E501

    name = "predictive"
    fits = True

    @property
    def matrices(self) -> bool:
        return self.rank > DEFAULT_RANK

    @property
    def _is_full(self) -> bool:
        return self.rank >= self.width

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
        """On a CPU, without rotation, a compiled loop: the same arithmetic, but sums in another
        order."""
        if hidden.device.type == "cpu" and not self._is_full:
            return self._encode_compiled(layer, hidden, below)
        return self.encode_tensors(layer, hidden, below)

    def encode_tensors(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """As :meth:`encode_layer`, on the device of the hidden states."""
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

    def _encode_compiled(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        values = hidden.float().contiguous().numpy()
        none = values[:0]
        before = none if below is None else below.state.numpy()
        correction = none
        if below is not None and self.rank:
            correction = self._correct(layer, below).numpy()
        codes = {
            spec.name: np.empty((len(values), spec.size), spec.dtype) for spec in self.code_arrays
        }
        state, decoded = np.empty_like(values), np.empty(values.shape, np.uint16)

        def encode_part(rows: slice) -> None:
            kernels.encode_predicted(
                values[rows],
                before[rows],
                self.parameters["slope"][layer],
                self.parameters["bias"][layer],
                correction[rows],
                SCALES,
                2.0**-self._quality,
                min(NUM_MASSIVE, self.width // 2),
                LN_EPS,
                *(codes[name][rows] for name in ("code", "escape", "scalar")),
                state[rows],
                decoded[rows],
            )

        in_parts(encode_part, len(values))
        tensors = {name: torch.from_numpy(array) for name, array in codes.items()}
        hidden = torch.from_numpy(decoded).view(torch.bfloat16)
        return Coded(tensors, hidden, torch.from_numpy(state))

    @property
    def _quality(self) -> float:
        assert self.quality is not None
        return self.quality

    def _predict(self, layer: int, below: Coded | None) -> torch.Tensor:
        """LN(h) of a layer from what a reader has of the layer below, fp32 ``[R or 1, H]``."""
        import torch

        device = torch.device("cpu") if below is None else below.state.device
        bias = self._fitted("bias", layer, device)
        if below is None:
            return bias[None]
        if self._is_full:
            return below.state @ self._fitted("matrix", layer, device) + bias
        predicted = below.state * self._fitted("slope", layer, device) + bias
        return predicted + self._correct(layer, below) if self.rank else predicted

    def _correct(self, layer: int, below: Coded) -> torch.Tensor:
        """What matrices of a rank add to the slope, fp32 ``[R, H]``."""
        import torch

        device = below.state.device
        number = below.codes["scalar"][:, 4:].long()  # [R, 1]
        tables = (torch.from_numpy(table).to(device)[number] for table in self._scales[1:])
        units, inverses = tables
        names = ("down", "up", "shrink", "gain")
        down, up, shrink, gain = (self._fitted(name, layer, device) for name in names)
        axes = _to_steps(_to_steps(below.state * inverses) @ down.T * shrink)  # [R, r]
        return axes @ up * gain * units

    def _fitted(self, name: str, layer: int, device: torch.device) -> torch.Tensor:
        import torch

        return self._parameter(name, device, torch.float32)[layer]

    def _rotate(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """The residual in the basis in which it is coded."""
        if not self._is_full:
            return residual
        return residual @ self._fitted("rotation", layer, residual.device).T

    def _rotate_back(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`_rotate`."""
        if not self._is_full:
            return residual
        return residual @ self._fitted("rotation", layer, residual.device)

    @cached_property
    def _scales(self) -> Scales:
        units = (SCALES.astype(np.float64) * 2**self._quality / UNITS).astype(np.float32)
        return Scales(SCALES, units, np.float32(1) / units)

    @cached_property
    def _prediction(self) -> Prediction:
        """The fitted arrays as the loops read them."""
        bias = self.parameters["bias"]
        none = np.zeros((len(bias), 0, self.width), np.float32)
        if self._is_full:
            bits = (self.parameters[name].astype(np.uint32) for name in ("matrix", "rotation"))
            matrix, rotation = ((array << 16).view(np.float32) for array in bits)
            zeros = np.zeros_like(bias)
            return Prediction(zeros, bias, none, none[:, :, 0], matrix, zeros, rotation)
        slope = self.parameters["slope"]
        if not self.rank:
            return Prediction(slope, bias, none, none[:, :, 0], none, slope, none)
        more = [(0, 0), (0, -self.rank % 4)]
        shrink = np.pad(self.parameters["shrink"], more)
        down, up = (np.pad(self.parameters[name], [*more, (0, 0)]) for name in ("down", "up"))
        down, up = down.astype(np.float32), up.astype(np.float32)
        return Prediction(slope, bias, down, shrink, up, self.parameters["gain"], none)

    def decode_layers(
        self, codes: CodeArrays, slots: np.ndarray, targets: np.ndarray, out: np.ndarray
    ) -> None:
        kernels.decode_predictive(
            codes["code"],
            codes["escape"],
            codes["scalar"],
            self._scales,
            self._prediction,
            slots,
            targets,
            out,
        )

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
            below = Coded({"scalar": scalar}, state, state)
            if layer in layers:
                words = scalar[:, 1:4:2].int() << 8 | scalar[:, 0:4:2].int()
                both = wrap(words, 1 << 15).to(torch.int16).view(torch.bfloat16).float()
                mean, deviation = both.split(1, 1)
                decoded[layer] = (state * deviation + mean).to(torch.bfloat16)
        return torch.stack([decoded[layer] for layer in layers], 1)

    @classmethod
    def fitted(cls, width: int, rank: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        if rank >= width:
            square = ((width, width), U2)
            return {"matrix": square, "rotation": square, "bias": ((width,), F4)}
        found: dict[str, tuple[tuple[int, ...], np.dtype]]
        found = {"slope": ((width,), F4), "bias": ((width,), F4)}
        if rank:
            found |= {"down": ((rank, width), I1), "up": ((rank, width), I1)}
            found |= {"shrink": ((rank,), F4), "gain": ((width,), F4)}
        return found

    @classmethod
    def fit(cls, sample: torch.Tensor, rank: int) -> dict[str, np.ndarray]:
        """Least squares, weighted by 1 / RMS**2, as a step is in proportion to the RMS.

        For ranks in between, reduced-rank regression (Izenman 1975) of what slopes leave; for the
        full one ridge regression, and the eigenvectors of its residual.
        """
        import torch

        fit_layer = _fit_lines if not rank else _fit_matrix
        if 0 < rank < sample.shape[2]:
            fit_layer = partial(_fit_axes, rank=rank)
        layers = [fit_layer(regression) for regression in _regressions(sample)]
        found = {}
        for name in layers[0]:
            values = torch.stack([layer[name] for layer in layers])
            values = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
            found[name] = values.cpu().numpy()
        return found


def _to_steps(values: torch.Tensor) -> torch.Tensor:
    """Rounded to the nearest integer from -127 to 127, as floats."""
    return values.clamp(-MAX_UNITS, MAX_UNITS).round()


def _fit_lines(given: _Regression) -> dict[str, torch.Tensor]:
    """``slope`` and ``bias`` of one layer, float32 ``[H]``."""
    weight, x, y = given.weight, given.below, given.normed
    mean_x, mean_y = _average(weight, x), _average(weight, y)
    x, y = x - mean_x, y - mean_y
    slope = (weight * x * y).sum(0) / ((weight * x * x).sum(0) + 1e-6)
    return {"slope": slope, "bias": mean_y - slope * mean_x}


def _fit_matrix(given: _Regression) -> dict[str, torch.Tensor]:
    """``matrix`` and ``rotation`` of one layer, bfloat16 ``[H, H]``, and ``bias``."""
    import torch

    weight, x, y = given.weight, given.below, given.normed
    mean_x, mean_y = _average(weight, x), _average(weight, y)
    matrix = torch.linalg.solve(*_moments(weight, x - mean_x, y - mean_y)).bfloat16()
    bias = mean_y - mean_x @ matrix.float()
    rest = (y - x @ matrix.float() - bias) * weight.sqrt()
    axes = torch.linalg.eigh((rest.T @ rest).double()).eigenvectors  # ascending
    return {"matrix": matrix, "rotation": axes.flip(1).T.bfloat16(), "bias": bias}


def _fit_axes(given: _Regression, rank: int) -> dict[str, torch.Tensor]:
    """``slope`` and ``bias`` of one layer, and the axes that correct them: ``down`` and ``up``,
    int8 ``[rank, H]``, ``shrink`` ``[rank]`` and ``gain`` ``[H]``, float32."""
    import torch

    weight, x, rms = given.weight, given.below, given.rms_below
    lines = _fit_lines(given)
    # What slopes leave, in units of the RMS below, from integers as decoding has them.
    rest = (given.normed - x * lines["slope"] - lines["bias"]) / rms
    weight = weight * rms.square()
    steps = _to_steps(x / rms * UNITS)
    gram, cross = _moments(weight, steps, rest)
    factor = torch.linalg.cholesky(gram)
    shape = len(gram), min(len(gram), rank + SPARE_AXES)
    generator = torch_generator(0, Purpose.CODEC_FIT)
    axes = torch.randn(shape, generator=generator, dtype=torch.float64).to(gram)
    for _ in range(POWERS):  # to the first eigenvectors of what a whole matrix would explain
        explained = cross.T @ torch.cholesky_solve(cross @ axes, factor)
        axes = torch.linalg.qr(explained).Q
    explained = axes.T @ cross.T @ torch.cholesky_solve(cross @ axes, factor)
    axes = axes @ torch.linalg.eigh(explained).eigenvectors.flip(1)[:, :rank]  # [H, rank]
    down, scale = _to_integers(torch.cholesky_solve(cross @ axes, factor).T)
    product = steps @ down.T
    deviation = _average(weight, product.square()).sqrt().clamp_min(1e-3)
    shrink = MAX_UNITS / (MAX_DEVIATIONS * deviation)
    columns, scale = _to_integers(axes / (scale[:, 0] * shrink))  # [H, rank]
    up, gain = columns.T, 1 / scale[:, 0].float()
    low = _to_steps(product * shrink) @ up * gain * rms
    return _fit_lines(replace(given, normed=given.normed - low)) | {
        "down": down.to(torch.int8),
        "shrink": shrink,
        "up": up.to(torch.int8),
        "gain": gain * UNITS,
    }


def _to_integers(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows times a scale each, in integers whose products with ``MAX_UNITS`` have an exact sum:
    float64 ``[N, K]`` -> float32 ``[N, K]``, float64 ``[N, 1]``."""
    import torch

    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-30)
    total = rows.abs().sum(1, keepdim=True).clamp_min(1e-30)
    most = EXACT_SUM / MAX_UNITS - rows.shape[1] / 2  # rounding adds half to each
    scale = torch.minimum(MAX_UNITS / largest, most / total)
    return (rows * scale).round().float(), scale


def _moments(
    weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sides of a ridge regression of y on x, float64 ``[H, H]`` each."""
    import torch

    gram = ((x * weight).T @ x).double()
    gram += (RIDGE * gram.diagonal().mean() + 1e-9) * torch.eye(len(gram)).to(gram)
    return gram, ((x * weight).T @ y).double()


def _robust_rms(normed: torch.Tensor) -> torch.Tensor:
    """RMS over the last axis without its 8 largest channels: ``[..., H]`` -> ``[...]``."""
    squares = normed.square()
    num = min(NUM_MASSIVE, squares.shape[-1] // 2)
    rest = squares.sum(-1) - squares.topk(num, dim=-1).values.sum(-1)
    return (rest.clamp_min(0) / (squares.shape[-1] - num)).sqrt()


@dataclass(frozen=True)
class _Regression:
    """What the LN(h) of a layer is predicted from, on a sample.

    Attributes:
        weight: of rows, ``[R, 1]``.
        below, normed: LN(h) of the layer below (zeros for the first) and of it, ``[R, H]``.
        rms_below: ``[R, 1]``.
    """

    weight: torch.Tensor
    below: torch.Tensor
    normed: torch.Tensor
    rms_below: torch.Tensor


def _regressions(sample: torch.Tensor) -> Iterator[_Regression]:
    """The regressions of a sample ``[R, L, H]``, by layer."""
    import torch

    below = rms_below = None
    for layer in range(sample.shape[1]):
        normed = layer_norm(sample[:, layer])
        rms = _robust_rms(normed).clamp_min(1e-3)[:, None]
        if below is None or rms_below is None:
            below, rms_below = torch.zeros_like(normed), torch.ones_like(rms)
        yield _Regression(rms**-2, below, normed, rms_below)
        below, rms_below = normed, rms


def _average(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (weight * values).sum(0) / weight.sum()
