"""Fit a codec to a sample of hidden states, and measure how small it makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ... import schemas
from .base import Codec, digest_parameters
from .chunks import compress
from .error import CodecError
from .predictive import Predictive
from .registry import CODECS, exact_positions, rank_of

if TYPE_CHECKING:
    import torch

MIN_FIT_ROWS, FIT_ROWS_PER_CHANNEL = 8_192, 8
"""Tokens to fit a codec on: at least so many, and so many per channel of the LLM."""
FIT_CHECKED = 2_048
"""Rows of the sample on which codes of 4 and of 8 bits are compared."""


def fit_rows(width: int) -> int:
    """Tokens to fit a codec on, for an LLM of this width."""
    return max(MIN_FIT_ROWS, FIT_ROWS_PER_CHANNEL * width)


def fit_codec(
    spec: schemas.Codec, sample: torch.Tensor, layers: Sequence[int]
) -> tuple[Codec, float]:
    """Fit a codec to a sample.

    Args:
        spec: as requested.
        sample: hidden states, any float dtype, ``[R, L, H]``, R at least 1.
        layers: numbers of all stored layers.

    Returns:
        The codec, and its bits per value on the first rows of the sample.
    """
    num_layers, width = sample.shape[1:]
    kind, rank = CODECS[spec.name], rank_of(spec, width)
    parameters = kind.fit(sample, rank)
    rows = sample[: min(len(sample), FIT_CHECKED)]
    choices: tuple[Literal[4, 8], ...] = (8, 4) if issubclass(kind, Predictive) else (8,)
    exact = exact_positions(spec, layers)
    best: tuple[Codec, float] | None = None
    for code_bits in choices:
        codec = kind(num_layers, width, parameters, spec.quality, code_bits, exact, rank)
        bits = bits_per_value(codec, rows)
        if best is None or bits < best[1]:
            best = codec, bits
    assert best is not None
    return best


def fitted_spec(spec: schemas.Codec, codec: Codec, captions: int, rows: int) -> schemas.Codec:
    """The spec of a codec for the manifest, once it is fitted to so many captions and rows."""
    fit = schemas.Fit(
        num_captions=captions, num_rows=rows, sha256=digest_parameters(codec.parameters)
    )
    code_bits = codec.code_bits if isinstance(codec, Predictive) else None
    return spec.model_copy(update={"fit": fit, "code_bits": code_bits})


def bits_per_value(codec: Codec, rows: torch.Tensor) -> float:
    """Bits per value of hidden states ``[R, L, H]`` in the chunks of a store."""
    chunks = compress(codec, encode_rows(codec, rows))
    num_bytes = sum(len(chunk) for of_array in chunks.values() for chunk in of_array)
    return 8 * num_bytes / rows.numel()


def encode_rows(
    codec: Codec, rows: torch.Tensor, error: CodecError | None = None
) -> dict[str, np.ndarray]:
    """Code all layers of hidden states ``[R, L, H]``: arrays by name, ``[R, L, size]``.

    Args:
        error: gathers the error of LN(h).
    """
    coded = None
    layers: dict[str, list[np.ndarray]] = {spec.name: [] for spec in codec.arrays}
    for layer in range(rows.shape[1]):
        coded = codec.encode(layer, rows[:, layer], coded)
        if error is not None:
            error.add(layer, rows[:, layer], coded.hidden)
        for name, codes in coded.codes.items():
            layers[name].append(codes.cpu().numpy())
    return {name: np.stack(parts, 1) for name, parts in layers.items()}
