"""Arrays without shards, which are read whole: fitted parameters, and the numbers of the layers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from ....schemas import InputError
from ....schemas.files import list_files
from ....schemas.json_file import load_json
from ..shard_file import CRC_BYTES, crc_fits
from .metadata import METADATA, PlainForm, plain_form

MAX_ZEROS = 2**27
"""Bytes that chunks which are not stored may stand for, beside as many as are stored."""
ReadFiles = Callable[[Iterable[str]], Mapping[str, Any]]
"""Names of files in a store -> their bytes, checked against its checksums."""


def read_plain(
    root: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, read: ReadFiles
) -> np.ndarray:
    """An array without shards, split along its first axis or not at all.

    Args:
        root: of the store.
        name: of the array's folder, relative to it.
        shape, dtype: as the manifest says.

    Raises:
        InputError: it is another array, or damaged.
    """
    file = f"{name}/{METADATA}"
    metadata = load_json(bytes(read([file])[file]), str(root / file))
    try:
        form = plain_form(metadata)
        for fault in _form_faults(form, shape, dtype):
            raise ValueError(fault)
    except ValueError as error:
        raise InputError(f"{root / file}: {error}") from error
    size = form.chunk_shape[0]
    chunks = {
        "/".join([name, "c", str(number), *["0"] * (len(shape) - 1)]): number
        for number in range(-(-shape[0] // size))
    }
    sizes = {each: entry.num_bytes for each, entry in list_files(root, f"{name}/c").items()}
    stored = [each for each in chunks if each in sizes]
    limit = math.prod(form.chunk_shape) * dtype.itemsize + 1024
    for each in stored:
        if sizes[each] > limit:
            raise InputError(f"{root / each} has {sizes[each]:,} bytes; expected at most {limit:,}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > 2 * sum(sizes[each] for each in stored) + MAX_ZEROS:
        raise InputError(f"{root / name}: {num_bytes:,} bytes are expected, most are missing")
    values = np.zeros(shape, dtype)
    for each, content in read(stored).items():
        rows = slice(chunks[each] * size, (chunks[each] + 1) * size)
        try:
            values[rows] = _decode(np.frombuffer(content, np.uint8), form)[: len(values[rows])]
        except (ValueError, zstandard.ZstdError) as error:
            raise InputError(f"{root / each} is damaged: {error}") from error
    return values


def _form_faults(form: PlainForm, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[str]:
    if form.shape != shape or form.dtype != dtype:
        yield f"holds {form.dtype} {form.shape}; expected {dtype} {shape}"
    elif form.chunk_shape not in (shape, (1, *shape[1:])):
        yield f"chunks are {form.chunk_shape}; expected {(1, *shape[1:])}"


def _decode(content: np.ndarray, form: PlainForm) -> np.ndarray:
    if form.has_crc:
        if not crc_fits(content):
            raise ValueError("its crc32c does not fit")
        content = content[:-CRC_BYTES]
    num_bytes = math.prod(form.chunk_shape) * form.dtype.itemsize
    if form.has_zstd:
        declared = zstandard.frame_content_size(content.data)
        if declared not in (-1, num_bytes):
            raise ValueError(f"declares {declared:,} bytes; expected {num_bytes:,}")
        plain = zstandard.ZstdDecompressor().decompress(content.data, num_bytes)
        content = np.frombuffer(plain, np.uint8)
    if len(content) != num_bytes:
        raise ValueError(f"{len(content):,} bytes; expected {num_bytes:,}")
    return content.view(form.dtype).reshape(form.chunk_shape)
