"""A shard's file: its index, its chunks, and the slices of chunks that are read from it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from mmap import ACCESS_READ, MADV_RANDOM, mmap
from pathlib import Path

import google_crc32c
import numpy as np
import zstandard

from ...schemas import InputError
from ...schemas.files import inside, is_local, on_fuse, open_file, read_file
from ..codecs.chunks import ChunkCodec
from ..codecs.kernels import copy_runs
from ..codecs.ranges import touch_ranges

CRC_BYTES = 4
ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that is not stored


class CorruptShardError(InputError):
    """Bytes on disk are not those that were written."""


def read_bytes(folder: Path, name: str, *, in_order: bool = True) -> np.ndarray:
    """Bytes of a shard's file, uint8; mapped if it is on a file system of this machine.

    Args:
        folder: of the array, or of the store.
        name: path of the file, relative to it.
        in_order: read from its beginning to its end. Otherwise the kernel reads no more of a
            mapped file than is touched: what is needed must be requested first.

    Raises:
        InputError: no such file, an empty one, or one that is not a plain file in the folder.
    """
    path = inside(folder, name)
    try:
        if is_local(path):
            with open_file(path) as file:
                mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
            if not in_order and not on_fuse(folder):
                mapped.madvise(MADV_RANDOM)
            content = np.frombuffer(mapped, np.uint8)
        else:
            content = np.frombuffer(read_file(path), np.uint8)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{path} is not written yet; rerun the command that makes this store"
        ) from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise CorruptShardError(f"{path} is empty") from error  # such a file cannot be mapped
    if not len(content):
        raise CorruptShardError(f"{path} is empty")
    return content


def tells_residency(path: Path) -> bool:
    """Whether the kernel tells this process which pages of a file are in memory: otherwise mincore
    says of all of them that they are (its manual: for files that one owns or may write)."""
    try:
        return os.access(path, os.W_OK) or os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


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
    """Chunks of a shard by number, each checked when it is first read.

    Args:
        path: of the file, for messages.
        content: its bytes, or its end with the index if chunks are fetched apart.
        num_chunks: as the layout says.
        codec: of its chunks.
        tells: whether the kernel tells which pages of the mapped file are in memory.

    Raises:
        CorruptShardError: the index is damaged, or leads out of the file.
    """

    def __init__(
        self,
        path: Path,
        content: np.ndarray,
        num_chunks: int,
        codec: ChunkCodec,
        *,
        tells: bool = False,
    ) -> None:
        self.path, self.bytes, self.codec, self.tells = path, content, codec, tells
        index = self.bytes[-(16 * num_chunks + CRC_BYTES) :]
        if len(index) != 16 * num_chunks + CRC_BYTES or not crc_fits(index):
            raise CorruptShardError(f"{path}: the shard's index is damaged")
        table = index[:-CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        self.offsets, self.sizes = table[:, 0].copy(), table[:, 1].copy()
        num_bytes = len(content) - len(index)
        for fault in index_faults(self.offsets, self.sizes, codec, num_bytes or None):
            raise CorruptShardError(f"{path}: {fault}")
        self.checked = np.zeros(num_chunks, bool)

    def copy(self, slices: ChunkSlices, out: np.ndarray) -> None:
        """Copy rows of uncompressed chunks to their targets in a contiguous ``out``."""
        self.check(slices.chunk)
        absent = self.offsets[slices.chunk] == ABSENT
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

    def addresses(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where stored chunks of a mapped file begin and end in memory, int64 ``[chunks]``."""
        stored = numbers[self.offsets[numbers] != ABSENT]
        starts = self.bytes.ctypes.data + self.offsets[stored].astype(np.int64)
        return starts, starts + self.sizes[stored].astype(np.int64)

    def check(self, numbers: np.ndarray) -> None:
        """Check those chunks of a mapped file that were not checked yet.

        The pages come from the disk without the GIL; the checksum of what is in memory takes
        microseconds.

        Raises:
            CorruptShardError: a chunk is not as it was written.
        """
        new = numbers[~self.checked[numbers] & (self.offsets[numbers] != ABSENT)]
        if not len(new):
            return
        starts = self.offsets[new].astype(np.int64)
        touch_ranges(self.bytes, starts, starts + self.sizes[new].astype(np.int64))
        for number in new.tolist():
            self._checked(number)

    def _checked(self, number: int) -> np.ndarray:
        """A stored chunk of a mapped file with its checksum, which fits."""
        start = int(self.offsets[number])
        coded = self.bytes[start : start + int(self.sizes[number])]
        if not self.checked[number]:
            self.check_fetched(number, coded)
        self.checked[number] = True
        return coded

    def check_fetched(self, number: int, coded: np.ndarray) -> None:
        """Check the bytes of a stored chunk, uint8.

        Raises:
            CorruptShardError: they are not as they were written.
        """
        start = int(self.offsets[number])
        if len(coded) != int(self.sizes[number]):
            raise CorruptShardError(f"{self.path}: chunk {number} at byte {start} is cut off")
        if not self.fits(number, coded):
            raise CorruptShardError(
                f"{self.path}: chunk {number} at byte {start} is damaged (its crc32c does not fit)"
            )

    def fits(self, number: int, coded: np.ndarray) -> bool:
        """Whether the bytes of a stored chunk, uint8, are as they were written."""
        return len(coded) == int(self.sizes[number]) and crc_fits(coded)

    def byte_range(self, number: int) -> tuple[int, int] | None:
        """First byte of a chunk and the byte after its last; None if it is not stored."""
        if self.offsets[number] == ABSENT:
            return None
        start = int(self.offsets[number])
        return start, start + int(self.sizes[number])

    def chunk(self, number: int, coded: np.ndarray | None = None) -> np.ndarray:
        """Rows of a chunk; zeros if it is not stored, since no caption uses it.

        Args:
            coded: the chunk as it is stored, checked, if the file was not read whole.
        """
        if self.offsets[number] == ABSENT:
            return np.zeros(self.codec.shape, self.codec.dtype)
        stored = self._checked(number) if coded is None else coded
        try:
            return self.codec.decode(stored[:-CRC_BYTES].data)
        except (zstandard.ZstdError, ValueError) as error:
            raise CorruptShardError(f"{self.path}: chunk {number} is damaged: {error}") from error


def index_faults(
    offsets: np.ndarray, sizes: np.ndarray, codec: ChunkCodec, num_bytes: int | None
) -> Iterator[str]:
    """What a shard's index says that cannot be.

    Args:
        offsets, sizes: of its chunks, uint64 ``[chunks]``.
        codec: of its chunks.
        num_bytes: of the file without the index; None: unknown.
    """
    largest = codec.max_bytes + CRC_BYTES
    limit = len(offsets) * largest
    if num_bytes is not None and num_bytes > limit:
        yield f"{num_bytes:,} bytes of chunks; the layout allows {limit:,}"
    end = np.uint64(limit if num_bytes is None else num_bytes)
    stored = (offsets != ABSENT) | (sizes != ABSENT)
    numbers, starts, sizes = np.flatnonzero(stored), offsets[stored], sizes[stored]
    least = codec.min_bytes + CRC_BYTES
    wrong = (sizes < np.uint64(least)) | (sizes > np.uint64(largest))
    for number, size in zip(numbers[wrong][:1], sizes[wrong][:1], strict=True):
        expected = f"{least:,} to {largest:,}" if least < largest else f"{largest:,}"
        yield f"chunk {number} has {size:,} bytes; expected {expected}"
    outside = (starts > end) | (sizes > end - np.minimum(starts, end))
    for number, start in zip(numbers[outside][:1], starts[outside][:1], strict=True):
        yield f"chunk {number} at byte {start:,} is outside the {end:,} bytes of chunks"
    if not (wrong | outside).any():
        order = np.argsort(starts)
        ends = (starts + sizes)[order]
        for number in numbers[order][1:][starts[order][1:] < ends[:-1]][:1]:
            yield f"chunk {number} lies upon another one"


def crc_fits(coded: np.ndarray) -> bool:
    stored = int.from_bytes(coded[-CRC_BYTES:].tobytes(), "little")
    # It takes an array as it is; of a memoryview, or by tobytes(), it would be a copy.
    return bool(google_crc32c.value(np.ascontiguousarray(coded[:-CRC_BYTES])) == stored)


def chunk_crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")
