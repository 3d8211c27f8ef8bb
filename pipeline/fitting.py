"""Fit a codec to a sample of hidden states, and see how small it makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import zstandard

from .. import schemas
from ..schemas import MAX_QUALITY, MIN_QUALITY, InputError
from .codecs import CODECS, Codec, Predictive
from .shards import ZSTD_LEVEL

if TYPE_CHECKING:
    import torch

DEFAULT_QUALITY = 4.0
"""Error of LN(h) 1.1e-2; see docs/benchmarks/codecs.md."""
MIN_FIT_ROWS, FIT_ROWS_A_CHANNEL = 8_192, 8
"""Tokens that a codec is fitted on: so many, and so many a channel of the LLM."""
FIT_CHECKED = 2_048
"""Rows of the sample on which codes of 4 and of 8 bits are compared."""


def fit_rows(width: int) -> int:
    """Tokens to fit a codec on, for an LLM of this width."""
    return max(MIN_FIT_ROWS, FIT_ROWS_A_CHANNEL * width)


def request_codec(name: str, quality: float | None) -> schemas.Codec:
    """The codec as asked for, not yet fitted."""
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


def fit_codec(name: str, sample: torch.Tensor, quality: float | None = None) -> tuple[Codec, float]:
    """Fit a codec to a sample.

    Args:
        sample: hidden states, any float dtype, ``[R, L, H]``, R at least 1.
        quality: for ``delta`` and ``linear``.

    Returns:
        The codec, and how many bits a value it took for the first rows of the sample, with zstd,
        in chunks of 8 rows.
    """
    num_layers, width = sample.shape[1:]
    parameters = CODECS[name].fit(sample)
    rows = sample[: min(len(sample), FIT_CHECKED)]
    choices: tuple[Literal[4, 8], ...] = (8, 4) if issubclass(CODECS[name], Predictive) else (8,)
    best: tuple[Codec, float] | None = None
    for code_bits in choices:
        codec = CODECS[name](num_layers, width, parameters, quality, code_bits)
        bits = bits_per_value(codec, rows)
        if best is None or bits < best[1]:
            best = codec, bits
    assert best is not None
    return best


def bits_per_value(codec: Codec, rows: torch.Tensor) -> float:
    """Bits that a value of hidden states ``[R, L, H]`` takes, with zstd, in chunks of 8 rows."""
    zstd, num_bytes, coded = zstandard.ZstdCompressor(ZSTD_LEVEL), 0, None
    planes: dict[str, list[np.ndarray]] = {plane.name: [] for plane in codec.planes}
    for layer in range(rows.shape[1]):
        coded = codec.encode(layer, rows[:, layer], coded)
        for name, codes in coded.planes.items():
            planes[name].append(codes.cpu().numpy())
    for plane in codec.planes:
        whole = np.stack(planes[plane.name], 1)
        for start in range(0, len(whole), 8):
            part = whole[start : start + 8]
            if plane.order is None:
                num_bytes += part.nbytes
            elif part.any():
                num_bytes += len(zstd.compress(part.transpose(plane.order).tobytes()))
    return 8 * num_bytes / rows.numel()
