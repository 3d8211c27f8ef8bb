"""Codecs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ... import schemas
from ...schemas import MAX_QUALITY, MIN_QUALITY, InputError
from .base import Codec, Lossy
from .bf16 import Bf16
from .lossless import Lossless
from .predictive import Delta, Linear, Predictive

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Bf16, Lossless, Delta, Linear)}
DEFAULT_QUALITY = 4.0
"""Error of LN(h) 1.1e-2; see docs/benchmarks/codecs.md."""


def open_codec(
    spec: schemas.Codec, layers: Sequence[int], width: int, parameters: Mapping[str, np.ndarray]
) -> Codec:
    """Open the codec that a manifest names, with its fitted parameters.

    Args:
        layers: numbers of all stored layers.
    """
    exact = exact_positions(spec, layers)
    return CODECS[spec.name](
        len(layers), width, parameters, spec.quality, spec.code_bits or 8, exact
    )


def exact_positions(spec: schemas.Codec, layers: Sequence[int]) -> tuple[int, ...]:
    """Positions, among the stored layers, of those that are also stored exactly."""
    return tuple(layers.index(layer) for layer in spec.exact_layers)


def request_codec(name: str, quality: float | None) -> schemas.Codec:
    """The spec of a codec as the user asked for it, not yet fitted.

    Raises:
        InputError: the codec has no quality, or it is out of range.
    """
    if not issubclass(CODECS[name], Predictive):
        if quality is not None:
            raise InputError(
                f"--quality {quality:g} is for delta and linear; --codec {name} has no step"
            )
        return schemas.Codec(name=name)
    quality = DEFAULT_QUALITY if quality is None else quality
    if not MIN_QUALITY <= quality <= MAX_QUALITY:
        raise InputError(
            f"--quality {quality:g}: expected {MIN_QUALITY:g} (coarse) to {MAX_QUALITY:g} (finer "
            "than bf16)"
        )
    return schemas.Codec(name=name, quality=quality)


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
            f"--exact-layers is for delta and linear; --codec {spec.name} stores every layer "
            "exactly"
        )
    return spec.model_copy(update={"exact_layers": tuple(sorted(layers))})


def fitted_before(spec: schemas.Codec, existing: schemas.Codec | None) -> schemas.Codec:
    """The existing spec, with its fit, where it is the one that is asked for."""
    if existing is None:
        return spec
    keys = ("name", "quality", "exact_layers")
    same = all(getattr(spec, key) == getattr(existing, key) for key in keys)
    return existing if same else spec
