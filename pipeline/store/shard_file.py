"""A shard's file: its index, its chunks, and the slices of chunks that are read from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zstandard

from ...schemas import InputError
from ...schemas.files import is_local, read_file
from ..codecs.chunks import ChunkCodec
from ..codecs.kernels import copy_runs

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that is not stored


class CorruptShardError(InputError):
    """Bytes on disk are not those that were written."""


def read_bytes(path: Path) -> np.ndarray:
    """Bytes of a shard's file, uint8; mapped if it is on a file system of this machine.

    Raises:
        InputError: no such file, or an empty one.
    """
    try:
        if is_local(path):
            return np.asarray(np.memmap(path, np.uint8, mode="r"))
        content = np.frombuffer(read_file(path), np.uint8)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is not written yet; rerun the command that makes this store"
        ) from error
    except ValueError as error:  # numpy refuses to map an empty file
        raise CorruptShardError(f"{path} is empty") from error
    if not len(content):
        raise CorruptShardError(f"{path} is empty")
    return content


@dataclass(frozen=True)
class ChunkSlices:
    """Slices of chunks and where their rows go, ordered by chunk; int64 ``[slices]`` each.

    Attributes:
        chunk: number of the chunk, over all shards.
        first: first row, in the chunk.
        num: number of rows.
        target: first row, in the output.
    """

    chunk: np.ndarray
    first: np.ndarray
    num: np.ndarray
    target: np.ndarray

    @classmethod
    def from_runs(
        cls,
        starts: np.ndarray,
        stops: np.ndarray,
        rows_per_chunk: int,
        targets: np.ndarray | None = None,
    ) -> "ChunkSlices":
        """Cut runs of rows at the boundaries of chunks.

        Rows 2 to 6 (run a) and 9 to 10 (run b) in chunks of 4 rows::

            row      0 1 2 3 | 4 5 6 7 | 8 9 10 11
            run          a a | a a a   |   b b
            chunk    0       | 1       | 2
            first    2       | 0       | 1
            num      2       | 3       | 2
            target   0       | 2       | 5

        Args:
            starts, stops: first row of each run and the row after its last, ``[runs]``.
            targets: first row of each run in the output; by default runs are packed, and
                neighbours become one run.
        """
        if not len(starts):
            return cls(*(np.empty(0, np.int64) for _ in range(4)))
        if targets is None:
            apart = starts[1:] != stops[:-1]
            starts = starts[np.concatenate([[True], apart])]
            stops = stops[np.concatenate([apart, [True]])]
            targets = np.cumsum(stops - starts) - (stops - starts)
        first_chunk = starts // rows_per_chunk
        counts = np.where(stops > starts, (stops - 1) // rows_per_chunk - first_chunk + 1, 0)
        run = np.repeat(np.arange(len(starts)), counts)
        chunk = first_chunk[run] + np.arange(len(run)) - (np.cumsum(counts) - counts)[run]
        begin = np.maximum(starts[run], chunk * rows_per_chunk)
        end = np.minimum(stops[run], (chunk + 1) * rows_per_chunk)
        target = targets[run] + begin - starts[run]
        order = np.argsort(chunk, kind="stable")
        slices = (chunk, begin - chunk * rows_per_chunk, end - begin, target)
        return cls(*(values[order] for values in slices))

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        arrays = (self.chunk, self.first, self.num, self.target)
        return zip(*(values.tolist() for values in arrays), strict=True)

    def select(self, part: np.ndarray | slice) -> "ChunkSlices":
        """The selected slices."""
        return ChunkSlices(self.chunk[part], self.first[part], self.num[part], self.target[part])

    def blocks(self, num_chunks: int) -> Iterator["ChunkSlices"]:
        """Parts of about ``num_chunks`` chunks each; no chunk is in two of them."""
        starts = np.flatnonzero(np.diff(self.chunk, prepend=-1))[::num_chunks].tolist()
        for start, stop in pairwise([*starts, len(self.chunk)]):
            yield self.select(slice(start, stop))

    def by_shard(self, num_chunks: int) -> Iterator[tuple[int, "ChunkSlices"]]:
        """Each shard with its slices, whose chunks are numbered within the shard."""
        shard = self.chunk // num_chunks
        starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(shard)]):
            part = self.select(slice(start, stop))
            number = int(shard[start])
            yield number, replace(part, chunk=part.chunk - number * num_chunks)

    def packed(self) -> "ChunkSlices":
        """The same slices, with targets one after the other from 0."""
        return ChunkSlices(self.chunk, self.first, self.num, np.cumsum(self.num) - self.num)

    def rows(self) -> np.ndarray:
        """Target of each row, int64 ``[sum(num)]``."""
        packed = np.cumsum(self.num) - self.num
        return np.arange(int(self.num.sum())) + np.repeat(self.target - packed, self.num)


class ShardFile:
    """Chunks of a shard by number, each checked when it is first read."""

    def __init__(self, path: Path, content: np.ndarray, num_chunks: int, codec: ChunkCodec) -> None:
        self.path, self.bytes, self.codec = path, content, codec
        index = self.bytes[-(16 * num_chunks + CRC_BYTES) :]
        if len(index) != 16 * num_chunks + CRC_BYTES or not _crc_fits(index):
            raise CorruptShardError(f"{path}: the shard's index is damaged")
        table = index[:-CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        self.offsets, self.sizes = table[:, 0].copy(), table[:, 1].copy()
        self.checked = np.zeros(num_chunks, bool)

    def copy(self, slices: ChunkSlices, out: np.ndarray) -> None:
        """Copy rows of uncompressed chunks to their targets in a contiguous ``out``."""
        for number in slices.chunk[~self.checked[slices.chunk]].tolist():
            self.chunk(number)
        absent = ~self.checked[slices.chunk]
        if absent.any():
            for target, num in zip(slices.target[absent], slices.num[absent], strict=True):
                out[target : target + num] = 0
            slices = slices.select(~absent)
        row_bytes = self.codec.num_bytes // self.codec.shape[0]
        copy_runs(
            self.bytes,
            self.offsets[slices.chunk].astype(np.int64) + slices.first * row_bytes,
            slices.num * row_bytes,
            slices.target * row_bytes,
            out.reshape(-1).view(np.uint8),
        )

    def byte_range(self, number: int) -> tuple[int, int] | None:
        """First byte of a chunk and the byte after its last; None if it is not stored."""
        if self.offsets[number] == ABSENT:
            return None
        start = int(self.offsets[number])
        return start, start + int(self.sizes[number])

    def chunk(self, number: int, coded: np.ndarray | None = None) -> np.ndarray:
        """Rows of a chunk; zeros if it is not stored, since no caption uses it.

        Args:
            coded: the chunk as it is stored, if the file was not read whole.
        """
        if (place := self.byte_range(number)) is None:
            return np.zeros(self.codec.shape, self.codec.dtype)
        start, size = place[0], place[1] - place[0]
        if coded is None:
            coded = self.bytes[start : start + size]
        elif len(coded) != size:
            raise CorruptShardError(f"{self.path}: chunk {number} at byte {start} is cut off")
        else:
            self.checked[number] = False  # fetched anew
        if not self.checked[number]:
            if not _crc_fits(coded):
                raise CorruptShardError(
                    f"{self.path}: chunk {number} at byte {start} is damaged (its crc32c does not "
                    "fit)"
                )
            if self.codec.order is None and size != self.codec.num_bytes + CRC_BYTES:
                raise CorruptShardError(f"{self.path}: chunk {number} has {size} bytes")
            self.checked[number] = True
        try:
            return self.codec.decode(coded[:-CRC_BYTES].data)
        except (zstandard.ZstdError, ValueError) as error:
            raise CorruptShardError(f"{self.path}: chunk {number} is no zstd: {error}") from error


def _crc_fits(coded: np.ndarray) -> bool:
    stored = int.from_bytes(coded[-CRC_BYTES:].tobytes(), "little")
    return bool(google_crc32c.value(coded[:-CRC_BYTES].tobytes()) == stored)


def chunk_crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")


@dataclass(frozen=True)
class _Form:
    """Storage of chunks in a known form: under zstd with their axes in this order, or raw."""

    order: tuple[int, ...] | None


def known_form(array: Any) -> _Form | None:
    """The form of an array that this module can read itself; None for any other array."""
    metadata = array.metadata.to_dict()
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    values = little if array.dtype.itemsize > 1 else {"name": "bytes"}
    crc = {"name": "crc32c"}
    try:
        (sharding,) = metadata["codecs"]
        configuration = sharding["configuration"]
        known = (
            sharding["name"] == "sharding_indexed"
            and configuration["index_location"] in ("end", None)
            and [*map(_plain, configuration["index_codecs"])] == [little, crc]
            and metadata["chunk_key_encoding"]["name"] == "default"
        )
        codecs = [*map(_plain, configuration["codecs"])]
        if not known or codecs[-1] != crc:
            return None
        if codecs[:-1] == [values]:
            return _Form(None)
        transpose, serializer, zstd = codecs[:-1]
        if (transpose["name"], serializer, zstd["name"]) == ("transpose", values, "zstd"):
            return _Form(tuple(transpose["configuration"]["order"]))
    except (KeyError, ValueError, TypeError):
        pass
    return None


def _plain(codec: Any) -> dict[str, Any]:
    document = dict(codec if isinstance(codec, Mapping) else codec.to_dict())
    if not document.get("configuration"):
        document.pop("configuration", None)
    return document
