"""One sharded Zarr array of rows: allocated whole, written a shard at a time, read in runs of rows.

Written by zarr-python. Read straight from the shard files where the array has exactly the codecs
that :func:`allocate` gives it (Zarr v3 ``sharding_indexed`` 1.0, index at the end, a crc32c on
every chunk and on the index), otherwise through zarr-python.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from ..schemas import InputError, Layout, WrittenFile

_CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)  # offset and size of a chunk that the shard does not hold


class CorruptShardError(InputError):
    """Bytes on disk are not those that were written."""


class RowArray:
    """Rows ``[num_shards * rows_per_shard, *row_shape]`` in shards.

    Args:
        path: folder of the Zarr array.
        layout: of the store.
        direct: read the shard files themselves; None: where the array is of the known form.
    """

    def __init__(self, path: Path, layout: Layout, *, direct: bool | None = None) -> None:
        self.path = path
        self.layout = layout
        self.array: Any = zarr.open_array(store=path, mode="r+")
        self.row_shape: tuple[int, ...] = tuple(self.array.shape[1:])
        self.dtype: np.dtype = self.array.dtype
        expected = (layout.num_shards * layout.rows_per_shard, *self.row_shape)
        if self.array.shape != expected:
            raise CorruptShardError(
                f"{path}: the array is {self.array.shape} but the manifest says {expected}"
            )
        self.direct = _is_known_form(self.array) if direct is None else direct
        self._shards: dict[int, _ShardFile] = {}

    def write_shard(self, shard: int, rows: np.ndarray) -> dict[str, WrittenFile]:
        """Write one whole shard, and make sure that it is on disk.

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
        start = shard * self.layout.rows_per_shard
        # A shard of nothing but zeros would otherwise not be stored at all.
        array = self.array if rows.any() else self.array.with_config({"write_empty_chunks": True})
        array[start : start + self.layout.rows_per_shard] = rows
        name = _shard_name(shard, len(self.row_shape))
        with (self.path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            num_bytes = os.fstat(file.fileno()).st_size
        return {name: WrittenFile(num_bytes=num_bytes, sha256=digest)}

    def read(
        self,
        starts: np.ndarray,
        stops: np.ndarray,
        out: np.ndarray,
        select: Sequence[int] | slice = slice(None),
    ) -> None:
        """Copy runs of rows, one after the other, into ``out``.

        Args:
            starts, stops: ``[runs]``; no run crosses a shard.
            out: ``[sum(stops - starts), selected, ...]``.
            select: positions along the first axis of a row.

        Raises:
            CorruptShardError: a chunk's checksum does not fit its bytes; checked when a chunk is
                first read.
            InputError: the shard is not there.
        """
        filled = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            target = out[filled : filled + stop - start]
            filled += stop - start
            if self.direct:
                self._read_run(start, stop, target, select)
            else:
                # Two steps: zarr-python's orthogonal selection would be slower still.
                target[:] = self.array[start:stop][:, select]

    def _read_run(
        self, start: int, stop: int, out: np.ndarray, select: Sequence[int] | slice
    ) -> None:
        shard, row = divmod(start, self.layout.rows_per_shard)
        file = self._shards.get(shard)
        if file is None:
            name = _shard_name(shard, len(self.row_shape))
            chunk_shape = (self.layout.rows_per_chunk, *self.row_shape)
            num_chunks = self.layout.rows_per_shard // self.layout.rows_per_chunk
            file = _ShardFile(self.path / name, chunk_shape, self.dtype, num_chunks)
            self._shards[shard] = file
        filled, last = 0, row + stop - start
        while row < last:
            chunk, first = divmod(row, self.layout.rows_per_chunk)
            num = min(self.layout.rows_per_chunk - first, last - row)
            out[filled : filled + num] = file.chunk(chunk)[first : first + num, select]
            filled, row = filled + num, row + num


def allocate(
    group: Any,
    name: str,
    layout: Layout,
    row_shape: tuple[int, ...],
    dtype: np.dtype,
    dimension_names: Sequence[str],
    attributes: Mapping[str, Any],
) -> None:
    """Create the metadata of an array in a Zarr group; no shard is written."""
    group.create_array(
        name,
        shape=(layout.num_shards * layout.rows_per_shard, *row_shape),
        chunks=(layout.rows_per_chunk, *row_shape),
        shards=(layout.rows_per_shard, *row_shape),
        dtype=dtype,
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(),
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=0,
        dimension_names=list(dimension_names),
        attributes=dict(attributes),
    )


class _ShardFile:
    """A memory-mapped shard: chunks by number, each checked when first touched."""

    def __init__(
        self, path: Path, chunk_shape: tuple[int, ...], dtype: np.dtype, num_chunks: int
    ) -> None:
        self.path, self.chunk_shape, self.dtype = path, chunk_shape, dtype
        try:
            self.bytes = np.memmap(path, np.uint8, mode="r")
        except FileNotFoundError as error:
            raise InputError(
                f"{path} is not written yet; run the command that makes this store again"
            ) from error
        except ValueError as error:  # numpy refuses to map an empty file
            raise CorruptShardError(f"{path} is empty") from error
        index = self.bytes[-(16 * num_chunks + _CRC_BYTES) :]
        if len(index) != 16 * num_chunks + _CRC_BYTES or not _crc_fits(index):
            raise CorruptShardError(f"{path}: the shard's index is damaged")
        table = index[:-_CRC_BYTES].view("<u8").reshape(num_chunks, 2)
        self.offsets, self.sizes = table[:, 0].copy(), table[:, 1].copy()
        self.checked = np.zeros(num_chunks, bool)

    def chunk(self, number: int) -> np.ndarray:
        if self.offsets[number] == _ABSENT:
            return np.zeros(self.chunk_shape, self.dtype)
        start, size = int(self.offsets[number]), int(self.sizes[number])
        coded = self.bytes[start : start + size]
        if not self.checked[number]:
            if not _crc_fits(coded):
                raise CorruptShardError(
                    f"{self.path}: chunk {number} at byte {start} is damaged (its crc32c does not "
                    "fit)"
                )
            self.checked[number] = True
        return coded[:-_CRC_BYTES].view(self.dtype).reshape(self.chunk_shape)


def _crc_fits(coded: np.ndarray) -> bool:
    stored = int.from_bytes(coded[-_CRC_BYTES:].tobytes(), "little")
    return bool(google_crc32c.value(coded[:-_CRC_BYTES].tobytes()) == stored)


def _shard_name(shard: int, row_dimensions: int) -> str:
    return "/".join(["c", str(shard), *["0"] * row_dimensions])


def _is_known_form(array: Any) -> bool:
    metadata = array.metadata.to_dict()
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    values = little if array.dtype.itemsize > 1 else {"name": "bytes"}
    crc = {"name": "crc32c"}
    try:
        (sharding,) = metadata["codecs"]
        configuration = sharding["configuration"]
        return bool(
            sharding["name"] == "sharding_indexed"
            and configuration["index_location"] in ("end", None)
            and [*map(_plain, configuration["codecs"])] == [values, crc]
            and [*map(_plain, configuration["index_codecs"])] == [little, crc]
            and metadata["chunk_key_encoding"]["name"] == "default"
            and isinstance(array.store, zarr.storage.LocalStore)
        )
    except (KeyError, ValueError, TypeError):
        return False


def _plain(codec: Any) -> dict[str, Any]:
    document = dict(codec if isinstance(codec, Mapping) else codec.to_dict())
    if not document.get("configuration"):
        document.pop("configuration", None)
    return document
