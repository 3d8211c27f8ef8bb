"""``zarr.json``: the form of an array, against what the manifest and the codec say."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....schemas import Layout
from ....schemas.files import read_file
from ....schemas.json_file import load_json

METADATA = "zarr.json"
MAX_METADATA_BYTES = 1_000_000
MAX_CHUNK_BYTES = 2**28
"""Largest chunk that is decoded; ours have a fourth of a million bytes, or one row."""
_DTYPES = ("int8", "uint8", "uint16", "int32", "float16", "float32")


@dataclass(frozen=True)
class StoredArray:
    """A sharded array as the manifest says that it is.

    Attributes:
        row_shape: of one row.
        dtype: of its values.
        order: axes of a chunk as they lie under zstd; None: not compressed.
    """

    row_shape: tuple[int, ...]
    dtype: np.dtype
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class ArrayForm:
    """An array of the documented form.

    Attributes:
        shape, dtype: of the array.
        shard_shape, chunk_shape: of its parts.
        order: as of :class:`StoredArray`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    order: tuple[int, ...] | None


@dataclass(frozen=True)
class PlainForm:
    """An array without shards: a fitted parameter, or a coordinate.

    Attributes:
        shape, dtype: of the array.
        chunk_shape: of its chunks.
        has_zstd, has_crc: what their bytes lie under, in this order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    has_zstd: bool
    has_crc: bool


def read_metadata(path: Path) -> Any:
    """The document in an array's ``zarr.json``.

    Raises:
        InputError: it is damaged.
        OSError: there is none, or it cannot be read.
    """
    file = path / METADATA
    return load_json(read_file(file, limit=MAX_METADATA_BYTES), str(file))


def sharded_form(metadata: Any) -> ArrayForm | None:
    """The form of an array that is read directly; None for any other array."""
    try:
        shape, dtype, shard_shape = _frame(metadata)
        ((name, sharding),) = map(_codec, metadata["codecs"])
        chunk_shape = _sizes(sharding["chunk_shape"], len(shape), least=1)
        index = [*map(_codec, sharding["index_codecs"])]
        codecs = [*map(_codec, sharding["codecs"])]
        known = (
            name == "sharding_indexed"
            and sharding.get("index_location", "end") == "end"
            and index == [_values(np.dtype("<u8")), _CRC]
            and codecs[-1] == _CRC
        )
        order = None
        if codecs[:-1] != [_values(dtype)]:
            (transpose, transposition), values, (zstd, _) = codecs[:-1]
            order = tuple(transposition["order"])
            known = known and (transpose, values, zstd) == ("transpose", _values(dtype), "zstd")
            known = known and sorted(order) == [*range(len(shape))]
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return ArrayForm(shape, dtype, shard_shape, chunk_shape, order) if known else None


def plain_form(metadata: Any) -> PlainForm:
    """The form of an array without shards.

    Raises:
        ValueError: it has another form than semroute gives such an array.
    """
    try:
        shape, dtype, chunk_shape = _frame(metadata)
        values, *rest = map(_codec, metadata["codecs"])
        names = [name for name, _ in rest]
        if values == _values(dtype) and names in ([], ["zstd"], ["crc32c"], ["zstd", "crc32c"]):
            return PlainForm(shape, dtype, chunk_shape, "zstd" in names, "crc32c" in names)
    except (KeyError, ValueError, TypeError, AttributeError):
        pass
    raise ValueError("is not of the documented form")


def array_faults(form: ArrayForm, expected: StoredArray, layout: Layout) -> Iterator[str]:
    """What of a sharded array is not as the manifest says."""
    shape = (layout.num_shards * layout.rows_per_shard, *expected.row_shape)
    pairs: Sequence[tuple[str, Any, Any]] = (
        ("the array is", form.shape, shape),
        ("values are", str(form.dtype), str(expected.dtype)),
        ("shards are", form.shard_shape, (layout.rows_per_shard, *expected.row_shape)),
        ("chunks are", form.chunk_shape, (layout.rows_per_chunk, *expected.row_shape)),
        ("the order of axes is", form.order, expected.order),
    )
    for what, found, wanted in pairs:
        if found != wanted:
            yield f"{what} {found}; the manifest says {wanted}"
    num_bytes = math.prod(form.chunk_shape) * form.dtype.itemsize
    if num_bytes > MAX_CHUNK_BYTES:
        yield f"a chunk has {num_bytes:,} bytes; expected at most {MAX_CHUNK_BYTES:,}"


def _frame(metadata: Any) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...]]:
    """Shape, dtype and grid of an array; any error of reading them means another form."""
    encoding, grid = metadata["chunk_key_encoding"], metadata["chunk_grid"]
    known = (
        metadata["zarr_format"] == 3
        and metadata["node_type"] == "array"
        and metadata["data_type"] in _DTYPES
        and metadata["fill_value"] == 0
        and not metadata.get("storage_transformers")
        and grid["name"] == "regular"
        and encoding["name"] == "default"
        and (encoding.get("configuration") or {}).get("separator", "/") == "/"
    )
    if not known:
        raise ValueError
    shape = _sizes(metadata["shape"], len(metadata["shape"]), least=0)
    chunks = _sizes(grid["configuration"]["chunk_shape"], len(shape), least=1)
    return shape, np.dtype(metadata["data_type"]).newbyteorder("<"), chunks


def _sizes(values: Sequence[Any], num: int, *, least: int) -> tuple[int, ...]:
    if len(values) != num or any(type(each) is not int or each < least for each in values):
        raise ValueError
    return tuple(values)


_CRC: tuple[str, Mapping[str, Any]] = ("crc32c", {})


def _values(dtype: np.dtype) -> tuple[str, Mapping[str, Any]]:
    return "bytes", {"endian": "little"} if dtype.itemsize > 1 else {}


def _codec(codec: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and configuration of a codec."""
    return codec["name"], codec.get("configuration") or {}
