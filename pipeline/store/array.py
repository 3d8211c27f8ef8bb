"""A sharded Zarr array of rows: created whole, written shard by shard, read in runs of rows.

Shard files are written and read directly, objects only in the parts needed, if the array has
exactly the codecs that :func:`create_array` gives it (Zarr v3 ``sharding_indexed`` 1.0, index at
the end; in a chunk ``transpose`` and ``zstd`` or neither; a crc32c on every chunk and on the
index). Other arrays are read through zarr-python. Files are identical to the byte to those of
zarr-python, which takes three times as long for its event-loop tasks around every chunk.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from ...schemas import InputError, Layout, WrittenFile, write_whole
from ...schemas.files import allow_open_files, inside, is_local, write_files
from ..codecs.chunks import ZSTD_LEVEL, ChunkCodec
from ..codecs.ranges import request_ranges
from .checks.metadata import METADATA, StoredArray, array_faults, read_metadata, sharded_form
from .checks.watch import FileWatch
from .remote.chunks import Parts, ReadAhead, RemoteChunks
from .remote.clients import open_client
from .shard_file import (
    ABSENT,
    CRC_BYTES,
    ChunkSlices,
    CorruptShardError,
    ShardFile,
    chunk_crc,
    read_bytes,
    tells_residency,
)

_ARRAYS = 8
"""Arrays of one process, about, each with as many shards; a mapped shard is an open file."""


@dataclass(frozen=True)
class CodedShard:
    """The file of a shard in memory.

    Attributes:
        name: path relative to the array.
        parts: its bytes, in order.
        file: size and sha256.
    """

    name: str
    parts: list[bytes]
    file: WrittenFile


class ShardedArray:
    """Rows ``[num_shards * rows_per_shard, *row_shape]`` in shards.

    Args:
        path: folder of the Zarr array, or one behind a URL (``upath.UPath``).
        layout: of the store.
        direct: read the shard files themselves; None: if the array is of the known form.

    Attributes:
        is_known: whether the array has exactly the codecs that :func:`create_array` gives it.
    """

    def __init__(self, path: Path, layout: Layout, *, direct: bool | None = None) -> None:
        self.path = path
        self.layout = layout
        self.is_local = is_local(path)
        try:
            metadata = read_metadata(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptShardError(f"{path} has no {METADATA}") from error
        self._form = form = sharded_form(metadata)
        self.is_known = form is not None
        self.direct = self.is_known if direct is None else direct
        found = self.array if form is None else form
        shape: tuple[int, ...] = tuple(found.shape)
        self.row_shape = shape[1:]
        self.dtype: np.dtype = found.dtype
        self.order = form.order if form else None
        expected = (layout.num_shards * layout.rows_per_shard, *self.row_shape)
        if shape != expected:
            raise CorruptShardError(
                f"{path / METADATA}: the array is {shape} but the manifest says {expected}"
            )
        for fault in self.faults(StoredArray(self.row_shape, self.dtype, self.order)):
            raise CorruptShardError(f"{path / METADATA}: {fault}")
        self.chunk_codec = ChunkCodec(
            (layout.rows_per_chunk, *self.row_shape), self.dtype, self.order
        )
        self._shards: dict[int, ShardFile] = {}
        self._watch = FileWatch(partial(_shard_path, path, len(self.row_shape)))
        self._remote: RemoteChunks | None = None
        if self.direct and not self.is_local:
            self.fetch_by(default_read_ahead())

    def fetch_by(self, ahead: ReadAhead, identity: str = "", *, whole: bool = False) -> None:
        """Fetch the chunks of an array of the known form, where otherwise files of this machine are
        mapped.

        Args:
            identity: of the store, which has another one if it is written again.
            whole: fetch the rest of a shard once its first chunk is requested.
        """
        if not self.direct:
            return
        self._remote = RemoteChunks(
            ahead,
            open_client(self.path),
            os.path.realpath(self.path) if self.is_local else str(self.path),
            identity,
            partial(shard_name, row_dimensions=len(self.row_shape)),
            self._num_chunks,
            16 * self._num_chunks + CRC_BYTES,
            self._open,
            whole=whole,
        )

    @property
    def _is_mapped(self) -> bool:
        return self.direct and self._remote is None

    def faults(self, expected: StoredArray, *, any_form: bool = True) -> Iterator[str]:
        """What of the array is not as the manifest says.

        Args:
            any_form: it may be an array that only zarr-python can read.
        """
        if self._form is not None:
            yield from array_faults(self._form, expected, self.layout)
        elif not any_form:
            yield "the array is not of the documented form"
        elif (self.row_shape, self.dtype) != (expected.row_shape, expected.dtype):
            yield (
                f"rows are {self.dtype} {self.row_shape}; the manifest says {expected.dtype} "
                f"{expected.row_shape}"
            )

    @cached_property
    def array(self) -> Any:
        """The array as zarr-python sees it."""
        try:
            return zarr.open_array(store=str(self.path), mode="r")
        except Exception as error:  # zarr-python has no kind of its own for damaged metadata
            raise CorruptShardError(f"{self.path / METADATA} is damaged: {error}") from error

    def code_shard(self, shard: int, rows: np.ndarray) -> "CodedShard":
        """The file of one whole shard, still to be written.

        Args:
            rows: ``[rows_per_shard, *row_shape]``; unused rows are zero and cost nothing.
        """
        expected = (self.layout.rows_per_shard, *self.row_shape)
        if rows.shape != expected or rows.dtype != self.dtype:
            raise ValueError(
                f"a shard is written whole: expected {expected} {self.dtype}, found {rows.shape} "
                f"{rows.dtype}"
            )
        if not self.is_known:
            raise InputError(
                f"{self.path}: the array has other codecs than semroute gives it, and can only "
                "be read"
            )
        name = shard_name(shard, len(self.row_shape))
        parts = self._code(rows)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        file = WrittenFile(num_bytes=sum(map(len, parts)), sha256=digest.hexdigest())
        return CodedShard(name, parts, file)

    def write_shard(self, shard: int, rows: np.ndarray) -> dict[str, WrittenFile]:
        """Write one whole shard, durably on disk or in the object store.

        Args:
            rows: as for :meth:`code_shard`.

        Returns:
            Path relative to the array -> the file written.
        """
        coded = self.code_shard(shard, rows)
        self.write_coded(coded)
        return {coded.name: coded.file}

    def write_coded(self, coded: "CodedShard") -> None:
        """Write the file of a shard."""
        # A worker that was taken for dead may still be writing the same bytes.
        write_whole(inside(self.path, coded.name), *coded.parts, alone=False)

    def open_shards(self) -> list[int]:
        """Shards whose files are kept open."""
        return [*self._shards]

    def forget(self, shard: int) -> None:
        """Close the file of a shard, so that the disk gets its space back if it is removed."""
        self._shards.pop(shard, None)
        self._watch.forget(shard)

    def _code(self, rows: np.ndarray) -> list[bytes]:
        """The file of a shard in parts: its chunks, without those of zeros, and the index.

        Three chunks, of which the second is all zeros::

            file     chunk 0 (120 bytes) | chunk 2 (80 bytes) | index     | crc32c
            index    0, 120              | ABSENT, ABSENT     | 120, 80   (offset and size)
        """
        num = self.layout.rows_per_chunk
        firsts = range(0, len(rows), num)

        def code(first: int, *, always: bool = False) -> bytes:
            coded = self.chunk_codec.encode(rows[first : first + num], always=always)
            return coded + chunk_crc(coded) if coded else b""

        if self.layout.num_threads > 1:
            with ThreadPoolExecutor(self.layout.num_threads) as pool:
                chunks = [*pool.map(code, firsts)]
        else:
            chunks = [*map(code, firsts)]
        if not any(chunks):  # a shard of nothing but zeros is written all the same
            chunks = [code(first, always=True) for first in firsts]
        index = np.full((len(chunks), 2), ABSENT, "<u8")
        sizes = np.array([*map(len, chunks)], np.uint64)
        stored = sizes > 0
        index[stored, 0], index[stored, 1] = (np.cumsum(sizes) - sizes)[stored], sizes[stored]
        return [*chunks, index.tobytes(), chunk_crc(index.tobytes())]

    def read(
        self,
        starts: np.ndarray,
        stops: np.ndarray,
        out: np.ndarray,
        select: Sequence[int] | slice = slice(None),
    ) -> None:
        """Copy runs of rows, one after the other, into ``out``.

        Args:
            starts, stops: first row of each run and the row after its last, ``[runs]``.
            out: ``[sum(stops - starts), selected, ...]``.
            select: positions along the first axis of a row.

        Raises:
            CorruptShardError: a chunk's checksum does not fit its bytes; checked when a chunk is
                first read.
            ChangedError: the shard's file is not the one that was opened.
            InputError: the shard is not written.
        """
        slices = ChunkSlices.from_runs(starts, stops, self.layout.rows_per_chunk)
        self.request(slices)
        self.read_slices(slices, out, select)

    def request(self, slices: ChunkSlices) -> None:
        """Ask the disk for the chunks of slices, and do not wait for them.

        Errors are those of :meth:`read_slices`, but for damage of chunks.
        """
        if self._remote is not None:
            self._check_unchanged(self._watched(slices))
            self._remote.request(np.unique(slices.chunk))
        if not self._is_mapped:
            return
        parts = [*slices.by_shard(self._num_chunks)]
        self._open_shards([shard for shard, _ in parts])
        starts, stops, known = [], [], []
        for shard, part in parts:
            file = self._shards[shard]
            first, last = file.addresses(part.chunk)
            starts.append(first)
            stops.append(last)
            known.append(np.full(len(first), file.tells))
        if parts:
            request_ranges(*map(np.concatenate, (starts, stops, known)))

    def read_slices(
        self, slices: ChunkSlices, out: np.ndarray, select: Sequence[int] | slice = slice(None)
    ) -> None:
        """Copy slices of chunks, which were requested, to their targets in ``out``; each chunk is
        read once.

        Args, errors: as for :meth:`read`.
        """
        shards = self._watched(slices)
        self._check_unchanged(shards)
        self._copy_slices(slices, out, select)
        self._check_unchanged(shards)  # what was written meanwhile would be among the rows

    def watch(self) -> None:
        """From now on, no file of a shard may change, whether it was read already or not."""
        if self._is_mapped:
            self._watch.start(range(self.layout.num_shards))

    def _watched(self, slices: ChunkSlices) -> list[int]:
        """Shards of slices, if their files can be watched: not by way of a cache, which may have
        what is gone."""
        cached = self._remote is not None and self._remote.ahead.cache is not None
        if not self.direct or not self.is_local or cached:
            return []
        num_chunks = self._num_chunks
        shards: list[int] = np.unique(slices.chunk // num_chunks).tolist()
        return shards

    def _check_unchanged(self, shards: Sequence[int]) -> None:
        for shard in self._watch.check(shards):
            if shard in self._shards:
                self._shards[shard].checked[:] = False

    def _copy_slices(
        self, slices: ChunkSlices, out: np.ndarray, select: Sequence[int] | slice
    ) -> None:
        num_chunks = self._num_chunks
        whole = select == slice(None) and out.shape[1:] == self.row_shape
        mapped = self._is_mapped
        fetched = {} if self._remote is None else self._remote.take(np.unique(slices.chunk))
        if mapped and self.order is None and whole and out.flags.c_contiguous:
            if out.dtype != self.dtype or len(out) < (slices.target + slices.num).max(initial=0):
                raise ValueError(f"out is {out.dtype} {out.shape}, which the rows do not fit")
            for shard, part in slices.by_shard(num_chunks):
                self._shard(shard).copy(part, out)
            return
        if mapped:
            for shard, part in slices.by_shard(num_chunks):
                self._shard(shard).check(part.chunk)
        last, rows = -1, np.empty(0)
        for chunk, first, num, target in slices:
            if chunk != last:
                rows = self._chunk(*divmod(chunk, num_chunks), fetched)
                last = chunk
            out[target : target + num] = rows[first : first + num, select]

    def _chunk(self, shard: int, number: int, fetched: Parts) -> np.ndarray:
        """One chunk ``[rows_per_chunk, *row_shape]``, perhaps a view of the mapped file."""
        if not self.direct:
            start = shard * self.layout.rows_per_shard + number * self.layout.rows_per_chunk
            return np.asarray(self.array[start : start + self.layout.rows_per_chunk])
        if self._remote is not None:
            coded = fetched.get(shard * self._num_chunks + number)
            return self._remote.files[shard].chunk(number, coded)
        return self._shard(shard).chunk(number)

    def _shard(self, shard: int) -> ShardFile:
        self._open_shards([shard])
        return self._shards[shard]

    def _open_shards(self, shards: Sequence[int]) -> None:
        """Map files of shards that are not mapped yet; all of their indexes are requested first."""
        new = [shard for shard in shards if shard not in self._shards]
        if not new:
            return
        self._check_unchanged(new)
        # Other arrays of the process have as many shards: features, latents, conditioning.
        allow_open_files(_ARRAYS * (len(self._shards) + len(new)))
        contents = {
            shard: read_bytes(self.path, shard_name(shard, len(self.row_shape)), in_order=False)
            for shard in new
        }
        stops = np.array([each.ctypes.data + len(each) for each in contents.values()], np.int64)
        sizes = np.minimum([*map(len, contents.values())], 16 * self._num_chunks + CRC_BYTES)
        request_ranges(stops - sizes, stops, np.zeros(len(stops), bool))
        for shard, content in contents.items():
            tells = tells_residency(self._shard_path(shard))
            self._shards[shard] = self._open(shard, content, tells=tells)

    def _open(self, shard: int, content: np.ndarray, *, tells: bool = False) -> ShardFile:
        """Args: content: the file, or its end with the index if chunks are fetched apart."""
        path = self._shard_path(shard)
        return ShardFile(path, content, self._num_chunks, self.chunk_codec, tells=tells)

    @property
    def _num_chunks(self) -> int:
        """Chunks of a shard."""
        return self.layout.rows_per_shard // self.layout.rows_per_chunk

    def _shard_path(self, shard: int) -> Path:
        return _shard_path(self.path, len(self.row_shape), shard)

    @property
    def max_shard_bytes(self) -> int:
        """Largest file of a shard."""
        return self._num_chunks * (self.chunk_codec.max_bytes + CRC_BYTES + 16) + CRC_BYTES

    def check_shard(self, shard: int, content: np.ndarray | None = None) -> None:
        """Read a whole shard of an array of the known form, and check every checksum.

        Args:
            content: bytes of its file, uint8; by default the file is read.

        Raises:
            CorruptShardError: bytes that are not as they were written.
            InputError: the shard is not written.
        """
        if content is None:
            content = read_bytes(self.path, shard_name(shard, len(self.row_shape)))
        file = self._open(shard, content)
        for number in range(self._num_chunks):
            file.chunk(number)


@cache
def default_read_ahead() -> ReadAhead:
    """What fetches for whoever has none of its own; one per process."""
    return ReadAhead()


@contextmanager
def new_group(path: Path) -> Iterator[Any]:
    """A Zarr group to create arrays in; its files are written when the block ends."""
    files: dict[str, Any] = {}
    yield zarr.create_group(zarr.storage.MemoryStore(files))
    write_files(path, {name: buffer.to_bytes() for name, buffer in files.items()})


def create_array(
    group: Any,
    name: str,
    layout: Layout,
    row_shape: tuple[int, ...],
    dtype: np.dtype,
    dimension_names: Sequence[str],
    attributes: Mapping[str, Any],
    order: Sequence[int] | None = None,
) -> None:
    """Create the metadata of an array in a Zarr group; no shard is written.

    Args:
        order: compress chunks with zstd, with their axes in this order; None: no compression.
    """
    group.create_array(
        name,
        shape=(layout.num_shards * layout.rows_per_shard, *row_shape),
        chunks=(layout.rows_per_chunk, *row_shape),
        shards=(layout.rows_per_shard, *row_shape),
        dtype=dtype,
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(),
        filters=None if order is None else [TransposeCodec(order=tuple(order))],
        compressors=[*([] if order is None else [ZstdCodec(level=ZSTD_LEVEL)]), Crc32cCodec()],
        fill_value=0,
        dimension_names=list(dimension_names),
        attributes=dict(attributes),
    )


def _shard_path(array: Path, row_dimensions: int, shard: int) -> Path:
    return array / shard_name(shard, row_dimensions)


def shard_name(shard: int, row_dimensions: int) -> str:
    """Path of a shard's file, relative to its array."""
    return "/".join(["c", str(shard), *["0"] * row_dimensions])
