"""Codecs by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ... import schemas
from ...schemas import MAX_QUALITY, MIN_QUALITY, InputError
from .base import Codec
from .bf16 import Bf16
from .lossless import Lossless
from .predictive import Delta, Linear, Predictive

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Bf16, Lossless, Delta, Linear)}
DEFAULT_QUALITY = 4.0
"""Error of LN(h) 1.1e-2; see docs/benchmarks/codecs.md."""


def open_codec(
    spec: schemas.Codec, num_layers: int, width: int, parameters: Mapping[str, np.ndarray]
) -> Codec:
    """Open the codec that a manifest names, with its fitted parameters."""
    return CODECS[spec.name](num_layers, width, parameters, spec.quality, spec.code_bits or 8)


def request_codec(name: str, quality: float | None) -> schemas.Codec:
    """The spec of a codec as the user asked for it, not yet fitted."""
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
