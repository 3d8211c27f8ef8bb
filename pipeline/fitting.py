"""Fit a codec to a sample of hidden states, and see how small it makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import zstandard

from .. import schemas
from ..schemas import MAX_QUALITY, MIN_QUALITY, InputError
from .codecs import CODECS, Codec, Predictive
from .distortion import CodecError
from .layout import choose_rows_per_chunk
from .parameters import digest_parameters
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
        The codec, and how many bits a value it took for the first rows of the sample.
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


def fitted_spec(spec: schemas.Codec, codec: Codec, captions: int, rows: int) -> schemas.Codec:
    """What a manifest says of a codec once it is fitted to so many captions and rows."""
    fit = schemas.Fit(
        num_captions=captions, num_rows=rows, sha256=digest_parameters(codec.parameters)
    )
    code_bits = codec.code_bits if isinstance(codec, Predictive) else None
    return spec.model_copy(update={"fit": fit, "code_bits": code_bits})


def bits_per_value(codec: Codec, rows: torch.Tensor) -> float:
    """Bits that a value of hidden states ``[R, L, H]`` takes in the chunks of a store."""
    chunks = compress(codec, encode_rows(codec, rows))
    return 8 * sum(len(chunk) for plane in chunks.values() for chunk in plane) / rows.numel()


def encode_rows(
    codec: Codec, rows: torch.Tensor, error: CodecError | None = None
) -> dict[str, np.ndarray]:
    """All layers of hidden states ``[R, L, H]`` as planes ``[R, L, size]``.

    Args:
        error: gathers what the codec does to LN(h).
    """
    coded = None
    planes: dict[str, list[np.ndarray]] = {plane.name: [] for plane in codec.planes}
    for layer in range(rows.shape[1]):
        coded = codec.encode(layer, rows[:, layer], coded)
        if error is not None:
            error.add(layer, rows[:, layer], coded.hidden)
        for name, codes in coded.planes.items():
            planes[name].append(codes.cpu().numpy())
    return {name: np.stack(parts, 1) for name, parts in planes.items()}


def compress(codec: Codec, planes: Mapping[str, np.ndarray]) -> dict[str, list[bytes]]:
    """The chunks of planes ``[R, L, size]`` as a store has them; b"" is all zeros."""
    zstd, size = zstandard.ZstdCompressor(ZSTD_LEVEL), _rows_per_chunk(codec)
    chunks: dict[str, list[bytes]] = {}
    for plane in codec.planes:
        whole, chunks[plane.name] = planes[plane.name], []
        for start in range(0, len(whole), size):
            part = whole[start : start + size]
            if plane.order is None:
                chunk = part.tobytes()
            else:
                chunk = zstd.compress(part.transpose(plane.order).tobytes()) if part.any() else b""
            chunks[plane.name].append(chunk)
    return chunks


def decompress(
    codec: Codec, chunks: Mapping[str, list[bytes]], num_rows: int
) -> dict[str, np.ndarray]:
    """Planes of ``num_rows`` rows from what :func:`compress` gave."""
    zstd, size = zstandard.ZstdDecompressor(), _rows_per_chunk(codec)
    planes = {}
    for plane in codec.planes:
        shape = (num_rows, codec.num_layers, plane.size)
        whole = planes[plane.name] = np.zeros(shape, plane.dtype)
        for number, chunk in enumerate(chunks[plane.name]):
            part = whole[number * size : (number + 1) * size]
            if plane.order is None:
                part[:] = np.frombuffer(chunk, plane.dtype).reshape(part.shape)
            elif chunk:
                view = part.transpose(plane.order)
                view[:] = np.frombuffer(zstd.decompress(chunk), plane.dtype).reshape(view.shape)
    return planes


def _rows_per_chunk(codec: Codec) -> int:
    return choose_rows_per_chunk(2 * codec.num_layers * codec.width)
