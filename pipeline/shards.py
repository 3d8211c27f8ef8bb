"""One sharded Zarr array of rows: allocated whole, written a shard at a time, read in runs of rows.

Shard files are written and read straight, of objects only the parts needed, where the array has
exactly the codecs that :func:`allocate` gives it (Zarr v3 ``sharding_indexed`` 1.0, index at the
end; in a chunk ``transpose`` and ``zstd`` or neither; a crc32c on every chunk and on the index).
Others are read through zarr-python. To the byte a file is what zarr-python would write, which takes
three times as long for it: tasks of an event loop around every chunk.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
import zstandard
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype

from ..schemas import InputError, Layout, WrittenFile, write_whole
from ..schemas.files import is_local, list_files, read_file, read_files, read_ranges, write_files
from .kernels import copy_runs

ZSTD_LEVEL = 1
"""Codes are noise with a known histogram: higher levels search for matches that are not there, and
came out larger."""
_CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that the shard does not hold


class CorruptShardError(InputError):
    """Bytes on disk are not those that were written."""


class RowArray:
    """Rows ``[num_shards * rows_per_shard, *row_shape]`` in shards.

    Args:
        path: folder of the Zarr array, or one behind a URL (``upath.UPath``).
        layout: of the store.
        direct: read the shard files themselves; None: where the array is of the known form.

    Attributes:
        is_known: whether the array has exactly the codecs that :func:`allocate` gives it.
    """

    def __init__(self, path: Path, layout: Layout, *, direct: bool | None = None) -> None:
        self.path = path
        self.layout = layout
        self.is_local = is_local(path)
        self.array: Any = open_array(path, whole=False)
        self.row_shape: tuple[int, ...] = tuple(self.array.shape[1:])
        self.dtype: np.dtype = self.array.dtype
        expected = (layout.num_shards * layout.rows_per_shard, *self.row_shape)
        if self.array.shape != expected:
            raise CorruptShardError(
                f"{path}: the array is {self.array.shape} but the manifest says {expected}"
            )
        form = _known_form(self.array)
        self.is_known = form is not None
        self.direct = self.is_known if direct is None else direct
        if not self.direct and not self.is_local:
            self.array = zarr.open_array(store=str(path), mode="r")
        self.order = form.order if form else None
        self._shards: dict[int, _ShardFile] = {}

    def write_shard(self, shard: int, rows: np.ndarray) -> dict[str, WrittenFile]:
        """Write one whole shard, and make sure that it is on disk, or in the object store.

        Args:
            rows: ``[rows_per_shard, *row_shape]``; rows that are not in use are zero and cost
                nothing.

        Returns:
            What was written, by path relative to the array.
        """
        expected = (self.layout.rows_per_shard, *self.row_shape)
        if rows.shape != expected or rows.dtype != self.dtype:
            raise ValueError(
                f"a shard is written whole: expected {expected} {self.dtype}, found {rows.shape} "
                f"{rows.dtype}"
            )
        if not self.is_known:
            raise InputError(
                f"{self.path}: the array has other codecs than semroute gives it, and is for "
                "reading only"
            )
        name = _shard_name(shard, len(self.row_shape))
        parts = self._code(rows)
        # A worker that was taken for dead may still be writing the same bytes.
        write_whole(self.path / name, *parts, alone=False)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return {name: WrittenFile(num_bytes=sum(map(len, parts)), sha256=digest.hexdigest())}

    def _code(self, rows: np.ndarray) -> list[bytes]:
        """The file of a shard in parts: its chunks, but for those of zeros, and the index."""
        num = self.layout.rows_per_chunk
        firsts = range(0, len(rows), num)

        def code(first: int, *, always: bool = False) -> bytes:
            chunk = rows[first : first + num]
            chunk = np.ascontiguousarray(chunk.transpose(self.order) if self.order else chunk)
            if not (always or chunk.any()):
                return b""
            coded = chunk.tobytes() if self.order is None else _zstd.compressor.compress(chunk.data)
            return coded + _crc(coded)

        if self.layout.num_threads > 1:
            with ThreadPoolExecutor(self.layout.num_threads) as pool:
                chunks = [*pool.map(code, firsts)]
        else:
            chunks = [*map(code, firsts)]
        if not any(chunks):  # a shard of nothing but zeros is there all the same
            chunks = [code(first, always=True) for first in firsts]
        index = np.full((len(chunks), 2), _ABSENT, "<u8")
        sizes = np.array([*map(len, chunks)], np.uint64)
        there = sizes > 0
        index[there, 0], index[there, 1] = (np.cumsum(sizes) - sizes)[there], sizes[there]
        return [*chunks, index.tobytes(), _crc(index.tobytes())]

    def read(
        self,
        starts: np.ndarray,
        stops: np.ndarray,
        out: np.ndarray,
        select: Sequence[int] | slice = slice(None),
    ) -> None:
        """Copy runs of rows, one after the other, into ``out``.

        Args:
            starts, stops: ``[runs]``.
            out: ``[sum(stops - starts), selected, ...]``.
            select: positions along the first axis of a row.

        Raises:
            CorruptShardError: a chunk's checksum does not fit its bytes; checked when a chunk is
                first read.
            InputError: the shard is not there.
        """
        self.read_pieces(Pieces.of(starts, stops, self.layout.rows_per_chunk), out, select)

    def read_pieces(
        self, pieces: "Pieces", out: np.ndarray, select: Sequence[int] | slice = slice(None)
    ) -> None:
        """Copy pieces of chunks to their targets in ``out``; neighbours of one chunk read it once.

        Args, errors: as for :meth:`read`.
        """
        num_chunks = self.layout.rows_per_shard // self.layout.rows_per_chunk
        whole = select == slice(None) and out.shape[1:] == self.row_shape
        mapped = self.direct and self.is_local
        fetched = self._fetch(pieces.chunk, num_chunks) if self.direct and not mapped else {}
        if mapped and self.order is None and whole and out.flags.c_contiguous:
            if out.dtype != self.dtype or len(out) < (pieces.target + pieces.num).max(initial=0):
                raise ValueError(f"out is {out.dtype} {out.shape}, which the rows do not fit")
            for shard, part in pieces.by_shard(num_chunks):
                self._shard(shard).copy(part, out)
            return
        last, rows = -1, np.empty(0)
        for chunk, first, num, target in pieces:
            if chunk != last:
                rows = self._chunk(*divmod(chunk, num_chunks), fetched.get(chunk))
                last = chunk
            out[target : target + num] = rows[first : first + num, select]

    def _fetch(self, chunks: np.ndarray, num_chunks: int) -> dict[int, np.ndarray]:
        """Chunks of objects as they are stored, by number over all shards: many at a time."""
        wanted = np.unique(chunks)
        shards = np.unique(wanted // num_chunks).tolist()
        new = [shard for shard in shards if shard not in self._shards]
        paths = [self._shard_path(shard) for shard in new]
        size = 16 * num_chunks + _CRC_BYTES
        try:
            indexes = read_ranges(paths, [-size] * len(new), [None] * len(new))
        except FileNotFoundError as error:
            raise InputError(
                f"a shard of {self.path} is not written yet; run the command that makes this "
                "store again"
            ) from error
        for shard, index in zip(new, indexes, strict=True):
            self._shards[shard] = self._open(shard, np.frombuffer(index, np.uint8))
        places = [self._shards[chunk // num_chunks].place(chunk % num_chunks) for chunk in wanted]
        stored = [(int(c), place) for c, place in zip(wanted, places, strict=True) if place]
        coded = read_ranges(
            [self._shard_path(chunk // num_chunks) for chunk, _ in stored],
            [start for _, (start, _) in stored],
            [stop for _, (_, stop) in stored],
        )
        pairs = zip(stored, coded, strict=True)
        return {chunk: np.frombuffer(content, np.uint8) for (chunk, _), content in pairs}

    def _chunk(self, shard: int, number: int, coded: np.ndarray | None = None) -> np.ndarray:
        """One chunk ``[rows_per_chunk, *row_shape]``, perhaps a view of the mapped file."""
        if not self.direct:
            start = shard * self.layout.rows_per_shard + number * self.layout.rows_per_chunk
            return np.asarray(self.array[start : start + self.layout.rows_per_chunk])
        return self._shard(shard).chunk(number, coded)

    def _shard(self, shard: int) -> "_ShardFile":
        file = self._shards.get(shard)
        if file is None:
            content = read_bytes(self._shard_path(shard))
            file = self._shards[shard] = self._open(shard, content)
        return file

    def _open(self, shard: int, content: np.ndarray) -> "_ShardFile":
        """Args: content: the file, or its end, of which chunks are then given."""
        path, chunk_shape = self._shard_path(shard), (self.layout.rows_per_chunk, *self.row_shape)
        num_chunks = self.layout.rows_per_shard // self.layout.rows_per_chunk
        return _ShardFile(path, content, chunk_shape, self.dtype, num_chunks, self.order)

    def _shard_path(self, shard: int) -> Path:
        return self.path / _shard_name(shard, len(self.row_shape))

    def check_shard(self, shard: int, content: np.ndarray | None = None) -> None:
        """Read a whole shard of an array of the known form, every checksum included.

        Args:
            content: of its file, uint8; default: it is read.

        Raises:
            CorruptShardError: bytes that are not those that were written.
            InputError: the shard is not there.
        """
        content = read_bytes(self._shard_path(shard)) if content is None else content
        file = self._open(shard, content)
        for number in range(self.layout.rows_per_shard // self.layout.rows_per_chunk):
            file.chunk(number)


def open_array(path: Path, *, whole: bool = True) -> Any:
    """A Zarr array; of one behind a URL its files are read at once.

    Args:
        whole: all its files, or only its metadata, which is enough for shards.
    """
    if is_local(path):
        return zarr.open_array(store=str(path), mode="r" if whole else "r+")
    files = read_files(path, list_files(path) if whole else ["zarr.json"])
    buffer = default_buffer_prototype().buffer
    held = {name: buffer.from_bytes(content) for name, content in files.items()}
    return zarr.open_array(zarr.storage.MemoryStore(held), mode="r")


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
class Pieces:
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
    ) -> "Pieces":
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

    def where(self, part: np.ndarray | slice) -> "Pieces":
        """Some of them."""
        return Pieces(self.chunk[part], self.first[part], self.num[part], self.target[part])

    def blocks(self, num_chunks: int) -> Iterator["Pieces"]:
        """The same in parts of about so many chunks; no chunk is in two."""
        starts = np.flatnonzero(np.diff(self.chunk, prepend=-1))[::num_chunks].tolist()
        for start, stop in pairwise([*starts, len(self.chunk)]):
            yield self.where(slice(start, stop))

    def by_shard(self, num_chunks: int) -> Iterator[tuple[int, "Pieces"]]:
        """Shard -> its pieces, whose chunks are counted within it."""
        shard = self.chunk // num_chunks
        starts = np.flatnonzero(np.diff(shard, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(shard)]):
            found = self.where(slice(start, stop))
            number = int(shard[start])
            yield number, replace(found, chunk=found.chunk - number * num_chunks)

    def packed(self) -> "Pieces":
        """The same, with targets one after the other from 0."""
        return Pieces(self.chunk, self.first, self.num, np.cumsum(self.num) - self.num)

    def rows(self) -> np.ndarray:
        """Target of every row, int64 ``[sum(num)]``."""
        packed = np.cumsum(self.num) - self.num
        return np.arange(int(self.num.sum())) + np.repeat(self.target - packed, self.num)


@contextmanager
def new_group(path: Path) -> Iterator[Any]:
    """A Zarr group to make arrays in; their files are written when the block ends."""
    files: dict[str, Any] = {}
    yield zarr.create_group(zarr.storage.MemoryStore(files))
    write_files(path, {name: buffer.to_bytes() for name, buffer in files.items()})


def allocate(
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
        order: compress chunks by zstd with their axes in this order; None: as they are, without
            compression.
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


class _ShardFile:
    """The bytes of a shard: chunks by number, each checked when first touched."""

    def __init__(
        self,
        path: Path,
        content: np.ndarray,
        chunk_shape: tuple[int, ...],
        dtype: np.dtype,
        num_chunks: int,
        order: tuple[int, ...] | None,
    ) -> None:
        self.path, self.chunk_shape, self.dtype, self.order = path, chunk_shape, dtype, order
        self.stored_shape = tuple(chunk_shape[axis] for axis in order or ())
        self.num_bytes = int(np.prod(chunk_shape)) * dtype.itemsize
        self.back = tuple(np.argsort(order or ()).tolist())
        self.bytes = content
        index = self.bytes[-(16 * num_chunks + _CRC_BYTES) :]
        if len(index) != 16 * num_chunks + _CRC_BYTES or not _crc_fits(index):
            raise CorruptShardError(f"{path}: the shard's index is damaged")
        table = index[:-_CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        self.offsets, self.sizes = table[:, 0].copy(), table[:, 1].copy()
        self.checked = np.zeros(num_chunks, bool)

    def copy(self, pieces: Pieces, out: np.ndarray) -> None:
        """Rows of chunks that are stored as they are, to their targets in a contiguous ``out``."""
        for number in pieces.chunk[~self.checked[pieces.chunk]].tolist():
            self.chunk(number)
        absent = ~self.checked[pieces.chunk]
        if absent.any():
            for target, num in zip(pieces.target[absent], pieces.num[absent], strict=True):
                out[target : target + num] = 0
            pieces = pieces.where(~absent)
        row_bytes = self.num_bytes // self.chunk_shape[0]
        copy_runs(
            self.bytes,
            self.offsets[pieces.chunk].astype(np.int64) + pieces.first * row_bytes,
            pieces.num * row_bytes,
            pieces.target * row_bytes,
            out.reshape(-1).view(np.uint8),
        )

    def place(self, number: int) -> tuple[int, int] | None:
        """First byte of a chunk, and the one after its last; None where it is not stored."""
        if self.offsets[number] == _ABSENT:
            return None
        start = int(self.offsets[number])
        return start, start + int(self.sizes[number])

    def chunk(self, number: int, coded: np.ndarray | None = None) -> np.ndarray:
        """Rows of a chunk; zeros where it is not stored, as no caption uses it.

        Args:
            coded: as it is stored, where the file is not at hand.
        """
        if (place := self.place(number)) is None:
            return np.zeros(self.chunk_shape, self.dtype)
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
            if self.order is None and size != self.num_bytes + _CRC_BYTES:
                raise CorruptShardError(f"{self.path}: chunk {number} has {size} bytes")
            self.checked[number] = True
        if self.order is None:
            return coded[:-_CRC_BYTES].view(self.dtype).reshape(self.chunk_shape)
        try:
            stored = _zstd.decompressor.decompress(coded[:-_CRC_BYTES].data, self.num_bytes)
            rows = np.frombuffer(stored, self.dtype).reshape(self.stored_shape)
        except (zstandard.ZstdError, ValueError) as error:
            raise CorruptShardError(f"{self.path}: chunk {number} is no zstd: {error}") from error
        return rows.transpose(self.back)


class _Zstd(threading.local):
    """One a thread: they may not be shared, and to make one costs as much as a small chunk."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


def _crc_fits(coded: np.ndarray) -> bool:
    stored = int.from_bytes(coded[-_CRC_BYTES:].tobytes(), "little")
    return bool(google_crc32c.value(coded[:-_CRC_BYTES].tobytes()) == stored)


def _crc(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(_CRC_BYTES, "little")


def _shard_name(shard: int, row_dimensions: int) -> str:
    return "/".join(["c", str(shard), *["0"] * row_dimensions])


@dataclass(frozen=True)
class _Form:
    """How chunks of a known form are stored: axes in this order under zstd, or as they are."""

    order: tuple[int, ...] | None


def _known_form(array: Any) -> _Form | None:
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
