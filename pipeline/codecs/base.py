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

from .array_spec import ArraySpec

if TYPE_CHECKING:
    import torch


LN_EPS = 1e-5
"""Of the parameter-free layer norm that routing applies (arXiv 2602.03510, reference code)."""
NUM_MASSIVE = 8
"""Channels left out of the RMS that scales a vector's step: with them in, one massive activation
makes the step of all ordinary channels coarse."""

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
    def planes(self) -> tuple[ArraySpec, ...]:
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


def robust_rms(normed: torch.Tensor) -> torch.Tensor:
    """RMS over the last axis without its 8 largest channels: ``[..., H]`` -> ``[...]``."""
    squares = normed.square()
    num = min(NUM_MASSIVE, squares.shape[-1] // 2)
    rest = squares.sum(-1) - squares.topk(num, dim=-1).values.sum(-1)
    return (rest.clamp_min(0) / (squares.shape[-1] - num)).sqrt()


def output_places(layers: Layers) -> np.ndarray:
    """Position -> where it goes in the output, -1 where it is not wanted; up to the last wanted."""
    places = np.full(max(layers) + 1, -1, np.int64)
    places[list(layers)] = np.arange(len(layers))
    return places


def pairs_of_layers(sample: torch.Tensor) -> Any:
    """Weights ``[R, 1]``, LN(h) of the layer below (zeros for the first) and of the layer."""
    import torch

    below: torch.Tensor | None = None
    for layer in range(sample.shape[1]):
        hidden = sample[:, layer].float()
        normed = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=LN_EPS)
        weight = robust_rms(normed).clamp_min(1e-3)[:, None] ** -2
        yield weight, torch.zeros_like(normed) if below is None else below, normed
        below = normed
