"""Hidden states <-> codes, and the error that this makes. Arithmetic only, no storage.

A codec turns the hidden states of a token, all layers, into *planes*: arrays of plain integers that
standard Zarr codecs compress well and any Zarr implementation reads. Layers are coded from the
lowest stored one up, each from what a reader will have of the layer below (a closed loop, so that
errors do not pile up). Decoding exists twice, in numpy (kernels compiled by numba) and in torch, on
any device.

Shapes: R rows (tokens), L stored layers, H width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from .. import schemas
from . import kernels
from .planes import LAYER_MAJOR, U1, U2, Plane, pair, unpair, wrap

if TYPE_CHECKING:
    import torch

LN_EPS = 1e-5
"""Of the parameter-free layer norm that routing applies (arXiv 2602.03510, reference code)."""
NUM_MASSIVE = 8
"""Channels left out of the RMS that scales a vector's step: with them in, one massive activation
makes the step of all ordinary channels coarse."""
RIDGE = 3e-3
"""Of the matrices of ``linear``, times the mean diagonal; 1e-4 to 1e-2 gave the same bits."""
MAX_CODE = 32_767
"""Codes are int16 before they are split; a larger one widens its vector's step instead."""
LOWEST_SCALE = 24
"""Scales are 2**(k / 8 - LOWEST_SCALE) for k in 0..255."""
SCALES = np.exp2(np.arange(256) / 8 - LOWEST_SCALE).astype(np.float32)
MIN_COUNT = 32
"""Times that an exponent must occur in the sample for ``lossless`` to learn what follows it."""

Planes = Mapping[str, np.ndarray]
Layers = Sequence[int]


@dataclass(frozen=True)
class Coded:
    """One layer of a batch, coded.

    Attributes:
        planes: by name, ``[R, size]``, on the device of the hidden states.
        hidden: what a reader will get, bfloat16 ``[R, H]``.
        state: what the layer above is coded from; None where layers stand alone.
    """

    planes: Mapping[str, torch.Tensor]
    hidden: torch.Tensor
    state: Any = None


@dataclass(frozen=True)
class Codec(ABC):
    """Hidden states of L layers of width H <-> planes.

    Attributes:
        name: in manifests.
        fits: names of the fitted arrays.
        aligned: whether captions begin at chunks, for which every plane must be compressed.
        matrices: whether decoding multiplies matrices, which is better left to a GPU.
        num_layers, width: L and H.
        parameters: fitted arrays by name, see :meth:`fit`.
        quality: where it can be chosen, the step is 2**-quality.
        code_bits: where it can be chosen, 4 or 8.
    """

    num_layers: int
    width: int
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    quality: float | None = None
    code_bits: Literal[4, 8] = 8

    name: ClassVar[str]
    fits: ClassVar[tuple[str, ...]] = ()
    aligned: ClassVar[bool] = True
    matrices: ClassVar[bool] = False

    @cached_property
    @abstractmethod
    def planes(self) -> tuple[Plane, ...]:
        """What is stored."""

    @abstractmethod
    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """Code one layer.

        Args:
            layer: position among the stored layers, from 0.
            hidden: finite, any float dtype, ``[R, H]``.
            below: of the position below, None for position 0.
        """

    @abstractmethod
    def decode(self, planes: Planes, layers: Layers, targets: np.ndarray, out: np.ndarray) -> None:
        """Decode on the CPU.

        Args:
            planes: ``[R, L, size]`` each.
            layers: positions wanted, in the order wanted.
            targets: row of ``out`` that each row goes to, int64 ``[R]``.
            out: takes the bits of bfloat16, uint16 ``[rows, len(layers), H]``.
        """

    @abstractmethod
    def decode_torch(self, planes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        """Decode where the planes are: bfloat16 ``[R, len(layers), H]``.

        Args:
            planes: ``[R, L, size]`` each.
            layers: positions wanted, in the order wanted.
        """

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """Parameters from a sample of hidden states, float ``[R, L, H]``."""
        return {}

    def _parameter(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A fitted array as a tensor, kept a device; uint16 are bits of bfloat16."""
        import torch

        key = (name, device, dtype)
        cache: dict[Any, torch.Tensor] = self.__dict__.setdefault("_tensors", {})
        if key not in cache:
            values = torch.from_numpy(np.ascontiguousarray(self.parameters[name]))
            if values.dtype == torch.uint16:
                values = values.view(torch.bfloat16)
            cache[key] = values.to(device, dtype)
        return cache[key]


class Bf16(Codec):
    """bfloat16, stored as its bits in uint16: rounding to nearest even is the only loss.

    Never float16: hidden states of real LLMs exceed its largest value, 65,504.
    """

    name = "bf16"
    aligned = False

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        return (Plane("hidden", U2, self.width, None, "bits of bfloat16"),)

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        rounded = hidden.to(torch.bfloat16)
        return Coded({"hidden": rounded.view(torch.uint16)}, rounded)

    def decode(self, planes: Planes, layers: Layers, targets: np.ndarray, out: np.ndarray) -> None:
        out[targets] = planes["hidden"][:, list(layers)]

    def decode_torch(self, planes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        bits = planes["hidden"].view(torch.bfloat16)
        return bits if list(layers) == list(range(bits.shape[1])) else bits[:, list(layers)]


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
    def planes(self) -> tuple[Plane, ...]:
        half = (self.width + 1) // 2
        return (
            Plane("code", U1, half, LAYER_MAJOR, "two exponents a byte, 4 bits each; 15: escape"),
            Plane("escape", U1, self.width, LAYER_MAJOR, "zigzag code - 14 where code is 15"),
            Plane("mantissa", U1, self.width, None, "sign, then the 7 bits of the mantissa"),
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
        wanted = _places(layers)
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
    def planes(self) -> tuple[Plane, ...]:
        codes = {8: "zigzag code, 255: escape", 4: "two zigzag codes a byte, 15: escape"}
        return (
            Plane("code", U1, -(-self.width * self.code_bits // 8), LAYER_MAJOR,
                  codes[self.code_bits]),
            Plane("escape", U2, self.width, LAYER_MAJOR,
                  f"zigzag code - {self._limit - 1} where code is {self._limit}"),
            Plane("scalar", U1, 5, (2, 1, 0), "bfloat16 mean, bfloat16 deviation, scale number"),
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
            _places(layers),
            targets,
            out,
        )

    @classmethod
    def fit(cls, sample: torch.Tensor) -> dict[str, np.ndarray]:
        """``slope`` and ``bias``, float32 ``[L, H]``: least squares, weighted by 1 / RMS**2."""
        import torch

        slopes, biases = [], []
        for weight, x, y in _pairs_of_layers(sample):
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
        wanted = _places(layers)
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
        for weight, x, y in _pairs_of_layers(sample):
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


CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Bf16, Lossless, Delta, Linear)}


def open_codec(
    spec: schemas.Codec, num_layers: int, width: int, parameters: Mapping[str, np.ndarray]
) -> Codec:
    """The codec that a manifest names, with its fitted parameters."""
    return CODECS[spec.name](num_layers, width, parameters, spec.quality, spec.code_bits or 8)


def robust_rms(normed: torch.Tensor) -> torch.Tensor:
    """RMS over the last axis without its 8 largest channels: ``[..., H]`` -> ``[...]``."""
    squares = normed.square()
    num = min(NUM_MASSIVE, squares.shape[-1] // 2)
    rest = squares.sum(-1) - squares.topk(num, dim=-1).values.sum(-1)
    return (rest.clamp_min(0) / (squares.shape[-1] - num)).sqrt()


def _places(layers: Layers) -> np.ndarray:
    """Position -> where it goes in the output, -1 where it is not wanted; up to the last wanted."""
    places = np.full(max(layers) + 1, -1, np.int64)
    places[list(layers)] = np.arange(len(layers))
    return places


def _pairs_of_layers(sample: torch.Tensor) -> Any:
    """Weights ``[R, 1]``, LN(h) of the layer below (zeros for the first) and of the layer."""
    import torch

    below: torch.Tensor | None = None
    for layer in range(sample.shape[1]):
        hidden = sample[:, layer].float()
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=LN_EPS)
        weight = robust_rms(normed).clamp_min(1e-3)[:, None] ** -2
        yield weight, torch.zeros_like(normed) if below is None else below, normed
        below = normed


def _average(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (weight * values).sum(0) / weight.sum()
