"""Rows per chunk, and the bytes of a chunk."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import zstandard

if TYPE_CHECKING:
    from .base import CodeArrays, Codec

MAX_ROWS_PER_CHUNK = 8
"""A chunk is the unit of reading: small against a caption of 5 to 100 tokens, so that little is
read in vain."""
CHUNK_BYTES = 262_144
"""Uncompressed size of a chunk: large against what each chunk costs (a table for zstd, a lookup).
For a large LLM that is one or two tokens."""
SHARED_CHUNK_BYTES = 65_536
"""The same where captions do not begin at chunks: a caption then needs parts of two, of which
neighbours' rows are read, checked and decoded in vain."""
ZSTD_LEVEL = 1
"""Codes are noise with a known histogram: higher levels search for matches that are not there, and
came out larger."""


def choose_rows_per_chunk(bytes_per_row: int, *, aligned: bool = True) -> int:
    """As many rows as ``CHUNK_BYTES`` hold, at least 1, at most 8.

    Args:
        aligned: whether captions begin at chunks; otherwise it is ``SHARED_CHUNK_BYTES``.
    """
    size = CHUNK_BYTES if aligned else SHARED_CHUNK_BYTES
    return max(1, min(MAX_ROWS_PER_CHUNK, round(size / bytes_per_row)))


class _Zstd(threading.local):
    """One per thread: they must not be shared, and making one costs as much as a small chunk."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


@dataclass(frozen=True)
class ChunkCodec:
    """Rows of a chunk <-> its bytes, without a checksum.

    Attributes:
        shape: of the chunk, rows first.
        dtype: of its values.
        order: axes as they lie in the chunk, under zstd; None: as they are, uncompressed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...] | None

    @cached_property
    def num_bytes(self) -> int:
        """Size when decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def min_bytes(self) -> int:
        """Fewest bytes of a chunk as it is stored."""
        return self.num_bytes if self.order is None else 1

    @property
    def max_bytes(self) -> int:
        """Most bytes of a chunk as it is stored: zstd adds less than this to what it cannot
        compress."""
        return self.num_bytes + (0 if self.order is None else self.num_bytes // 128 + 1024)

    @cached_property
    def _stored_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order or ())

    @cached_property
    def _inverse_order(self) -> tuple[int, ...]:
        return tuple(np.argsort(self.order or ()).tolist())

    def encode(self, rows: np.ndarray, *, always: bool = False) -> bytes:
        """The bytes of rows; b"" where all of them are zero.

        Args:
            always: give the bytes of zeros too.
        """
        rows = np.ascontiguousarray(rows if self.order is None else rows.transpose(self.order))
        if not (always or rows.any()):
            return b""
        return rows.tobytes() if self.order is None else _zstd.compressor.compress(rows.data)

    def decode(self, content: bytes | memoryview) -> np.ndarray:
        """Rows from the bytes of a chunk, which are not empty; uncompressed ones are a view.

        Raises:
            zstandard.ZstdError, ValueError: the bytes are not such a chunk, or are of more rows.
        """
        if self.order is None:
            return np.frombuffer(content, self.dtype).reshape(self.shape)
        # Where a frame declares its size, that is what would be allocated, whatever the limit.
        declared = zstandard.frame_content_size(content)
        if declared not in (-1, self.num_bytes):
            raise ValueError(f"declares {declared:,} bytes; expected {self.num_bytes:,}")
        stored = _zstd.decompressor.decompress(content, self.num_bytes, allow_extra_data=False)
        rows = np.frombuffer(stored, self.dtype).reshape(self._stored_shape)
        return rows.transpose(self._inverse_order)


def compress(codec: Codec, codes: CodeArrays) -> dict[str, list[bytes]]:
    """The chunks of each array of codes ``[R, L, size]``, as a store has them."""
    size = _rows_per_chunk(codec)
    chunks = {}
    for spec in codec.arrays:
        whole = codes[spec.name]
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        chunks[spec.name] = [
            ChunkCodec(part.shape, spec.dtype, spec.order).encode(part) for part in parts
        ]
    return chunks


def decompress(
    codec: Codec, chunks: Mapping[str, list[bytes]], num_rows: int
) -> dict[str, np.ndarray]:
    """Arrays of codes of ``num_rows`` rows from the chunks that :func:`compress` gave."""
    size = _rows_per_chunk(codec)
    codes = {}
    for spec in codec.arrays:
        shape = (num_rows, spec.num_layers(codec.num_layers), spec.size)
        whole = np.zeros(shape, spec.dtype)
        for number, chunk in enumerate(chunks[spec.name]):
            part = whole[number * size : (number + 1) * size]
            if chunk:
                part[:] = ChunkCodec(part.shape, spec.dtype, spec.order).decode(chunk)
        codes[spec.name] = whole
    return codes


def _rows_per_chunk(codec: Codec) -> int:
    return choose_rows_per_chunk(2 * codec.num_layers * codec.width, aligned=codec.aligned)
