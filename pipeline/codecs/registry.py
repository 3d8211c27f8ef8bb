"""Codecs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ... import schemas
from ...schemas import DEFAULT_RANK, MAX_QUALITY, MIN_QUALITY, InputError
from .base import Codec, Lossy
from .bf16 import Bf16
from .lossless import Lossless
from .predictive import Predictive

CODECS: dict[str, type[Codec]] = {
    "bf16": Bf16,
    "lossless": Lossless,
    "delta": Predictive,
    "linear": Predictive,
    "predictive": Predictive,
}
"""``delta`` and ``linear`` are ``predictive`` of rank 0 and of the full rank."""
_LOSSY = "delta, linear and predictive"
DEFAULT_QUALITY = 4.0
"""Error of LN(h) 1.1e-2; see docs/benchmarks/codecs.md."""


def open_codec(
    spec: schemas.Codec, layers: Sequence[int], width: int, parameters: Mapping[str, np.ndarray]
) -> Codec:
    """Open the codec that a manifest names, with its fitted parameters.

    Args:
        layers: numbers of all stored layers.
    """
    return CODECS[spec.name](
        len(layers),
        width,
        parameters,
        spec.quality,
        spec.code_bits or 8,
        exact_positions(spec, layers),
        rank_of(spec, width),
    )


def fitted_arrays(spec: schemas.Codec, width: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Names of the fitted arrays of a codec -> shape for each layer, and dtype."""
    return CODECS[spec.name].fitted(width, rank_of(spec, width))


def rank_of(spec: schemas.Codec, width: int) -> int:
    """The rank of a codec for hidden states of this width, from 0 to the width."""
    return width if spec.name == "linear" else spec.rank or 0


def exact_positions(spec: schemas.Codec, layers: Sequence[int]) -> tuple[int, ...]:
    """Positions, among the stored layers, of those that are also stored exactly."""
    return tuple(layers.index(layer) for layer in spec.exact_layers)


def request_codec(
    name: str, quality: float | None = None, rank: schemas.Rank | None = None
) -> schemas.Codec:
    """The spec of a codec as the user asked for it, not yet fitted.

    Args:
        rank: of ``predictive``: 0 is ``delta``, and "full" is ``linear``; None: see
            :func:`settle_rank`.

    Raises:
        InputError: the codec has no quality or rank, or it is out of range.
    """
    if name == "predictive":
        name = {0: "delta", "full": "linear"}.get(rank, name)
    elif rank is not None:
        raise InputError(f"--rank {rank} is for --codec predictive, not {name}")
    if not issubclass(CODECS[name], Predictive):
        if quality is not None:
            raise InputError(f"--quality {quality:g} is for {_LOSSY}; --codec {name} has no step")
        return schemas.Codec(name=name)
    quality = DEFAULT_QUALITY if quality is None else quality
    if not MIN_QUALITY <= quality <= MAX_QUALITY:
        raise InputError(
            f"--quality {quality:g}: expected {MIN_QUALITY:g} (coarse) to {MAX_QUALITY:g} (finer "
            "than bf16)"
        )
    return schemas.Codec(name=name, quality=quality, rank=rank if name == "predictive" else None)


def settle_rank(spec: schemas.Codec, width: int) -> schemas.Codec:
    """The spec of a codec for hidden states of this width, with the default rank if it has none.

    Raises:
        InputError: the rank is not below the width.
    """
    if spec.name != "predictive":
        return spec
    rank = min(DEFAULT_RANK, width - 1) if spec.rank is None else spec.rank
    if rank >= width:
        raise InputError(
            f"--rank {rank}: the hidden states have {width} channels; expected --rank 0 to "
            f"{width - 1}, or full"
        )
    return spec.model_copy(update={"rank": rank})


def is_lossy(codec: str) -> bool:
    """Whether layers can be stored exactly beside a codec."""
    return issubclass(CODECS[codec], Lossy)


def with_exact_layers(spec: schemas.Codec, layers: Sequence[int]) -> schemas.Codec:
    """The spec of a codec beside which layers, by their numbers, are stored exactly.

    Raises:
        InputError: the codec stores every layer exactly.
    """
    if layers and not is_lossy(spec.name):
        raise InputError(
            f"--exact-layers is for {_LOSSY}; --codec {spec.name} stores every layer exactly"
        )
    return spec.model_copy(update={"exact_layers": tuple(sorted(layers))})


def fitted_before(spec: schemas.Codec, existing: schemas.Codec | None) -> schemas.Codec:
    """The existing spec, with its fit, where it is the one that is asked for."""
    if existing is None:
        return spec
    keys = ("name", "quality", "rank", "exact_layers")
    same = all(getattr(spec, key) == getattr(existing, key) for key in keys)
    return existing if same else spec
