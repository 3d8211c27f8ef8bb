"""The contract of codecs: hidden states <-> arrays of integers. Arithmetic only, no storage.

A codec turns the hidden states of a token, all layers, into *codes*: arrays of plain integers that
standard Zarr codecs compress well and any Zarr implementation reads. Layers are coded from the
lowest stored one up, each from what a reader will have of the layer below (a closed loop, so that
errors do not pile up). Decoding exists twice, in numpy (kernels compiled by numba) and in torch, on
any device.

Shapes: R rows (tokens), L stored layers, H width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ...schemas import LN_EPS

if TYPE_CHECKING:
    import torch

U1, I1, U2, F4 = np.dtype("u1"), np.dtype("i1"), np.dtype("<u2"), np.dtype("<f4")
LAYER_MAJOR = (1, 0, 2)
"""An :attr:`ArraySpec.order`: all rows of the first layer, then all rows of the second ..."""

EXACT = "exact"
"""Name of the array of layers that are stored exactly beside a codec with loss."""

CodeArrays = Mapping[str, np.ndarray]
"""Codes by the name of their array, ``[R, L, size]`` each."""
Layers = Sequence[int]


@dataclass(frozen=True)
class ArraySpec:
    """One array of codes, ``[R, L, size]``.

    Attributes:
        name: of the Zarr array.
        dtype: of its values.
        size: values per row and layer.
        order: axes of (row, layer, value) as they lie in a compressed chunk; None: the chunk is
            not compressed and its axes stay as they are.
        meaning: one line, for the array's attributes.
        layers: positions of the stored layers that it holds, ascending; None: all.
    """

    name: str
    dtype: np.dtype
    size: int
    order: tuple[int, int, int] | None
    meaning: str
    layers: tuple[int, ...] | None = None

    def num_layers(self, num_stored: int) -> int:
        """Size of its layer axis in a store of so many layers."""
        return num_stored if self.layers is None else len(self.layers)

    def place(self, layer: int) -> int:
        """Index of a stored layer (position) along its layer axis."""
        return layer if self.layers is None else self.layers.index(layer)


def allocate(
    specs: Iterable[ArraySpec], num_rows: int, num_layers: int, used: np.ndarray
) -> dict[str, np.ndarray]:
    """Memory for a shard's codes, by name ``[num_rows, num_layers, size]``; where an array holds
    only some layers, ``[num_rows, those, size]``.

    Rows that are not in use are zero; those in use are to be written. In memory the axes lie in the
    order of chunks, so that what is written for one layer, and what is cut out for one chunk, is
    contiguous. Three rows (a, b, c) of two layers (0, 1) under ``LAYER_MAJOR``::

        as indexed   [row, layer]    a0 a1 | b0 b1 | c0 c1
        in memory    [layer, row]    a0 b0 c0 | a1 b1 c1

    Args:
        used: rows in use, int64.
    """
    unused = np.ones(num_rows, bool)
    unused[used] = False
    arrays = {}
    for spec in specs:
        order = spec.order or (0, 1, 2)
        shape = (num_rows, spec.num_layers(num_layers), spec.size)
        memory = np.empty([shape[axis] for axis in order], spec.dtype)
        arrays[spec.name] = memory.transpose(np.argsort(order))
        arrays[spec.name][unused] = 0
    return arrays


def insert(
    arrays: Mapping[str, np.ndarray],
    specs: Iterable[ArraySpec],
    layer: int,
    rows: np.ndarray,
    codes: Mapping[str, torch.Tensor],
) -> None:
    """Put the codes of one layer (position) into their rows.

    Args:
        arrays: from :func:`allocate`.
        rows: int64 ``[R]``.
        codes: ``[R, size]`` each, on the CPU; arrays without this layer have none.
    """
    for spec in specs:
        if spec.name in codes:
            arrays[spec.name][rows, spec.place(layer)] = codes[spec.name].numpy()


@dataclass(frozen=True)
class Coded:
    """One layer of a batch, coded.

    Attributes:
        codes: by the name of their array, ``[R, size]``, on the device of the hidden states.
        hidden: what a reader will get, bfloat16 ``[R, H]``.
        state: what the layer above is coded from; None where layers stand alone.
    """

    codes: Mapping[str, torch.Tensor]
    hidden: torch.Tensor
    state: Any = None


@dataclass(frozen=True)
class Codec(ABC):
    """Hidden states of L layers of width H <-> codes.

    Attributes:
        name: of the class.
        fits: whether there are fitted arrays.
        aligned: whether captions begin at chunks, for which every array must be compressed.
        num_layers, width: L and H.
        parameters: fitted arrays by name, see :meth:`fit`.
        quality: where it can be chosen, the step is 2**-quality.
        code_bits: where it can be chosen, 4 or 8.
        exact: where it can be chosen, positions of layers that are also stored exactly.
        rank: where it can be chosen, of what predicts a layer from the one below, 0 to H.
    """

    num_layers: int
    width: int
    parameters: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    quality: float | None = None
    code_bits: Literal[4, 8] = 8
    exact: tuple[int, ...] = ()
    rank: int = 0

    name: ClassVar[str]
    fits: ClassVar[bool] = False
    aligned: ClassVar[bool] = True

    @property
    def matrices(self) -> bool:
        """Whether decoding multiplies matrices so large that it is better left to a GPU."""
        return False

    @cached_property
    @abstractmethod
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that a store holds."""

    @abstractmethod
    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """Code one layer.

        Args:
            layer: position among the stored layers, from 0.
            hidden: finite, any float dtype, ``[R, H]``.
            below: the position below, coded; None for position 0.
        """

    @abstractmethod
    def decode(
        self, codes: CodeArrays, layers: Layers, targets: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode on the CPU.

        Args:
            codes: ``[R, L, size]`` each.
            layers: positions wanted, in the order wanted.
            targets: row of ``out`` that each row goes to, int64 ``[R]``.
            out: receives the bits of bfloat16, uint16 ``[rows, len(layers), H]``.
        """

    @abstractmethod
    def decode_torch(self, codes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        """Decode on the device that holds the codes: bfloat16 ``[R, len(layers), H]``.

        Args:
            codes: ``[R, L, size]`` each.
            layers: positions wanted, in the order wanted.
        """

    def depths(self, layers: Layers) -> dict[str, int]:
        """How much of each array decoding needs: its lowest layers, by their number.

        Args:
            layers: positions wanted. An array that is not needed is left out.
        """
        return {spec.name: max(layers) + 1 for spec in self.arrays}

    @classmethod
    def fitted(cls, width: int, rank: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Names of the fitted arrays -> shape for each layer, and dtype, as :meth:`fit` gives
        them."""
        return {}

    @classmethod
    def fit(cls, sample: torch.Tensor, rank: int) -> dict[str, np.ndarray]:
        """Parameters from a sample of hidden states, float ``[R, L, H]``."""
        return {}

    def _parameter(self, name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """A fitted array as a tensor, cached per device; uint16 are bits of bfloat16."""
        import torch

        key = (name, device, dtype)
        cache: dict[Any, torch.Tensor] = self.__dict__.setdefault("_tensors", {})
        if key not in cache:
            values = torch.from_numpy(np.ascontiguousarray(self.parameters[name]))
            if values.dtype == torch.uint16:
                values = values.view(torch.bfloat16)
            cache[key] = values.to(device, dtype)
        return cache[key]


class Lossy(Codec):
    """A codec with loss, beside which some layers can be stored exactly, in an array of their own.

    Layers above are coded from what the codes of these layers give, as if that array were not
    there; readers get its rows.
    """

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        if not self.exact:
            return self.code_arrays
        exact = ArraySpec(EXACT, U2, self.width, LAYER_MAJOR, "bits of bfloat16", self.exact)
        return (*self.code_arrays, exact)

    @cached_property
    @abstractmethod
    def code_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that hold all layers."""

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        coded = self.encode_layer(layer, hidden, below)
        if layer not in self.exact:
            return coded
        rounded = hidden.to(torch.bfloat16)
        return Coded({**coded.codes, EXACT: rounded.view(torch.uint16)}, rounded, coded.state)

    @abstractmethod
    def encode_layer(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        """Code one layer, as :meth:`encode`, without the exact array."""

    def decode(
        self, codes: CodeArrays, layers: Layers, targets: np.ndarray, out: np.ndarray
    ) -> None:
        if any(layer not in self.exact for layer in layers):
            self.decode_layers(codes, output_slots(layers, self.exact), targets, out)
        for slot, layer in enumerate(layers):
            if layer in self.exact:
                out[targets, slot] = codes[EXACT][:, self.exact.index(layer)]

    @abstractmethod
    def decode_layers(
        self, codes: CodeArrays, slots: np.ndarray, targets: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode layers on the CPU, as :meth:`decode`.

        Args:
            slots: of each layer up to the highest one wanted, its index in ``out``, or -1.
        """

    def decode_torch(self, codes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        coded = [layer for layer in layers if layer not in self.exact]
        decoded = {}
        if coded:
            found = self.decode_layers_torch(codes, coded)
            if len(coded) == len(layers):
                return found
            decoded = dict(zip(coded, found.unbind(1), strict=True))
        for layer in layers:
            if layer in self.exact:
                decoded[layer] = codes[EXACT][:, self.exact.index(layer)].view(torch.bfloat16)
        return torch.stack([decoded[layer] for layer in layers], 1)

    @abstractmethod
    def decode_layers_torch(
        self, codes: Mapping[str, torch.Tensor], layers: Layers
    ) -> torch.Tensor:
        """Decode layers on the device that holds the codes, as :meth:`decode_torch`."""

    def depths(self, layers: Layers) -> dict[str, int]:
        coded = [layer for layer in layers if layer not in self.exact]
        found = {spec.name: max(coded) + 1 for spec in self.code_arrays} if coded else {}
        places = [self.exact.index(layer) for layer in layers if layer in self.exact]
        return found | ({EXACT: max(places) + 1} if places else {})


def digest_parameters(parameters: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, shapes, dtypes and values of fitted arrays."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        array = np.ascontiguousarray(parameters[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def layer_norm(hidden: torch.Tensor) -> torch.Tensor:
    """LN(h) as routing reads it, without parameters, in float32: ``[..., H]`` -> ``[..., H]``."""
    import torch

    return torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=LN_EPS)


def output_slots(layers: Layers, without: Layers = ()) -> np.ndarray:
    """For each position up to the last one wanted, its index in the output; -1: not wanted.

    Positions 4 and 1 of six: ``[-1, 1, -1, -1, 0]``.

    Args:
        without: positions that are not wanted after all; not all of them.
    """
    wanted = {layer: slot for slot, layer in enumerate(layers) if layer not in without}
    slots = np.full(max(wanted) + 1, -1, np.int64)
    slots[list(wanted)] = list(wanted.values())
    return slots
