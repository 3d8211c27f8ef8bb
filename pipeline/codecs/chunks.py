"""Rows per chunk, and the bytes of a chunk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import zstandard

from .base import Codec


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


MAX_ROWS_PER_CHUNK = 8
"""Unit of read: small against a caption of 5 to 100 tokens, so that little is read in vain."""
CHUNK_BYTES = 262_144
"""Uncompressed: a chunk's own cost (a table of zstd's, a look-up) is little against so much. Of a
large LLM it is a token or two."""


def choose_rows_per_chunk(bytes_per_row: int) -> int:
    """As many rows as ``CHUNK_BYTES`` hold, at least 1, at most 8."""
    return max(1, min(MAX_ROWS_PER_CHUNK, round(CHUNK_BYTES / bytes_per_row)))


ZSTD_LEVEL = 1
"""Codes are noise with a known histogram: higher levels search for matches that are not there, and
came out larger."""
