"""One shard file: its index, its chunks, and the runs of rows read from them."""

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
ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that the shard does not hold


class CorruptShardError(InputError):
    """Bytes on disk are not those that were written."""


def read_bytes(path: Path) -> np.ndarray:
    """A shard's file: uint8, mapped where it is on a file system of this machine.

    Raises:
        InputError: it is not there, or empty.
    """
    try:
        if is_local(path):
            return np.asarray(np.memmap(path, np.uint8, mode="r"))
        content = np.frombuffer(read_file(path), np.uint8)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is not written yet; run the command that makes this store again"
        ) from error
    except ValueError as error:  # numpy refuses to map an empty file
        raise CorruptShardError(f"{path} is empty") from error
    if not len(content):
        raise CorruptShardError(f"{path} is empty")
    return content


@dataclass(frozen=True)
class ChunkSlices:
    """Parts of chunks and where their rows go, ordered by chunk; int64 ``[pieces]`` each.

    Attributes:
        chunk: counted over all shards.
        first: row in the chunk.
        num: rows.
        target: first row of the output.
    """

    chunk: np.ndarray
    first: np.ndarray
    num: np.ndarray
    target: np.ndarray

    @classmethod
    def of(
        cls,
        starts: np.ndarray,
        stops: np.ndarray,
        rows_per_chunk: int,
        targets: np.ndarray | None = None,
    ) -> "ChunkSlices":
        """Cut runs of rows at the boundaries of chunks.

        Args:
            starts, stops: ``[runs]``.
            targets: where each run goes; default: one after the other, neighbours as one run.
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
        found = (chunk, begin - chunk * rows_per_chunk, end - begin, target)
        return cls(*(values[order] for values in found))

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        arrays = (self.chunk, self.first, self.num, self.target)
        return zip(*(values.tolist() for values in arrays), strict=True)

    def where(self, part: np.ndarray | slice) -> "ChunkSlices":
        """Some of them."""
        return ChunkSlices(self.chunk[part], self.first[part], self.num[part], self.target[part])

    def blocks(self, num_chunks: int) -> Iterator["ChunkSlices"]:
        """The same in parts of about so many chunks; no chunk is in two."""
        starts = np.flatnonzero(np.diff(self.chunk, prepend=-1))[::num_chunks].tolist()
        for start, stop in pairwise([*starts, len(self.chunk)]):
            yield self.where(slice(start, stop))

    def by_shard(self, num_chunks: int) -> Iterator[tuple[int, "ChunkSlices"]]:
        """Shard -> its pieces, whose chunks are counted within it."""
        shard = self.chunk // num_chunks
        starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(shard)]):
            found = self.where(slice(start, stop))
            number = int(shard[start])
            yield number, replace(found, chunk=found.chunk - number * num_chunks)

    def packed(self) -> "ChunkSlices":
        """The same, with targets one after the other from 0."""
        return ChunkSlices(self.chunk, self.first, self.num, np.cumsum(self.num) - self.num)

    def rows(self) -> np.ndarray:
        """Target of every row, int64 ``[sum(num)]``."""
        packed = np.cumsum(self.num) - self.num
        return np.arange(int(self.num.sum())) + np.repeat(self.target - packed, self.num)


class ShardFile:
    """The bytes of a shard: chunks by number, each checked when first touched."""

    def __init__(self, path: Path, content: np.ndarray, num_chunks: int, codec: ChunkCodec) -> None:
        self.path, self.bytes, self.codec = path, content, codec
        index = self.bytes[-(16 * num_chunks + CRC_BYTES) :]
        if len(index) != 16 * num_chunks + CRC_BYTES or not _crc_fits(index):
            raise CorruptShardError(f"{path}: the shard's index is damaged")
        table = index[:-CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        self.offsets, self.sizes = table[:, 0].copy(), table[:, 1].copy()
        self.checked = np.zeros(num_chunks, bool)

    def copy(self, pieces: ChunkSlices, out: np.ndarray) -> None:
        """Rows of chunks that are stored as they are, to their targets in a contiguous ``out``."""
        for number in pieces.chunk[~self.checked[pieces.chunk]].tolist():
            self.chunk(number)
        absent = ~self.checked[pieces.chunk]
        if absent.any():
            for target, num in zip(pieces.target[absent], pieces.num[absent], strict=True):
                out[target : target + num] = 0
            pieces = pieces.where(~absent)
        row_bytes = self.codec.num_bytes // self.codec.shape[0]
        copy_runs(
            self.bytes,
            self.offsets[pieces.chunk].astype(np.int64) + pieces.first * row_bytes,
            pieces.num * row_bytes,
            pieces.target * row_bytes,
            out.reshape(-1).view(np.uint8),
        )

    def place(self, number: int) -> tuple[int, int] | None:
        """First byte of a chunk, and the one after its last; None where it is not stored."""
        if self.offsets[number] == ABSENT:
            return None
        start = int(self.offsets[number])
        return start, start + int(self.sizes[number])

    def chunk(self, number: int, coded: np.ndarray | None = None) -> np.ndarray:
        """Rows of a chunk; zeros where it is not stored, as no caption uses it.

        Args:
            coded: as it is stored, where the file is not at hand.
        """
        if (place := self.place(number)) is None:
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
    """How chunks of a known form are stored: axes in this order under zstd, or as they are."""

    order: tuple[int, ...] | None


def known_form(array: Any) -> _Form | None:
    """What this module can read itself, None for anything else."""
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
