"""The arrays of a codec on disk: slices of chunks read and decoded in blocks, on several threads,
and the fitted arrays in ``hidden.zarr/parameters``."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from zarr.codecs import Crc32cCodec

from ...schemas import FeatureManifest
from ..codecs.base import Codec, digest_parameters
from ..codecs.registry import fitted_arrays, open_codec
from .array import ShardedArray
from .checks.plain import ReadFiles, read_plain
from .documents import StoreError
from .shard_file import ChunkSlices

BLOCK_BYTES = 4_000_000
"""Decoded bytes of a block, which one thread reads and decodes at a time."""
Allocator = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Returns memory of a shape and dtype, not initialised."""
PARAMETERS = "parameters"
_DIMENSIONS = {
    "slope": ("layer", "channel"),
    "bias": ("layer", "channel"),
    "base": ("layer", "channel"),
    "follow": ("layer", "distance"),
    "matrix": ("layer", "channel_below", "channel"),
    "rotation": ("layer", "axis", "channel"),
    "down": ("layer", "axis", "channel_below"),
    "up": ("layer", "axis", "channel"),
    "shrink": ("layer", "axis"),
    "gain": ("layer", "channel"),
}


def read_rows(
    arrays: Mapping[str, ShardedArray],
    codec: Codec,
    slices: ChunkSlices,
    positions: list[int],
    out: np.ndarray,
    num_threads: int,
) -> None:
    """Decode slices into their targets in ``out``.

    Args:
        positions: of the layers.
        out: uint16 ``[rows, len(positions), H]``.
    """
    request_rows(arrays, codec, slices, positions)
    if codec.name == "bf16":
        is_whole = positions == list(range(codec.num_layers))
        arrays["hidden"].read_slices(slices, out, slice(None) if is_whole else positions)
        return

    def decode(block: ChunkSlices) -> None:
        codes = read_codes(arrays, block.packed(), int(block.num.sum()), codec.depths(positions))
        codec.decode(codes, positions, block.rows(), out)

    (rows_per_chunk,) = {array.layout.rows_per_chunk for array in arrays.values()}
    chunk_bytes = rows_per_chunk * 2 * codec.num_layers * codec.width
    blocks = [*slices.blocks(max(1, BLOCK_BYTES // chunk_bytes))]
    if num_threads > 1 and len(blocks) > 1:
        with ThreadPoolExecutor(min(num_threads, len(blocks))) as pool:
            for _ in pool.map(decode, blocks):
                pass
    else:
        for block in blocks:
            decode(block)


def request_rows(
    arrays: Mapping[str, ShardedArray], codec: Codec, slices: ChunkSlices, positions: list[int]
) -> None:
    """Ask the disk for all that decoding slices needs, and do not wait for it.

    Args:
        positions: of the layers.
    """
    for name in codec.depths(positions):
        arrays[name].request(slices)


def read_codes(
    arrays: Mapping[str, ShardedArray],
    slices: ChunkSlices,
    num_rows: int,
    depths: Mapping[str, int],
    empty: Allocator = np.empty,
) -> dict[str, np.ndarray]:
    """Codes by array, ``[num_rows, depth, size]`` each, of slices that were requested.

    Args:
        depths: how many of its lowest layers are read of an array; others are not read.
    """
    codes = {}
    for name, depth in depths.items():
        array = arrays[name]
        codes[name] = empty((num_rows, depth, array.row_shape[1]), array.dtype)
        array.read_slices(slices, codes[name], slice(depth))
    return codes


def write_parameters(group: Any, parameters: Mapping[str, np.ndarray]) -> None:
    """Write fitted arrays, one chunk per layer, into a Zarr group; nothing if there are none."""
    if not parameters:
        return
    folder = group.create_group(PARAMETERS)
    for name, values in parameters.items():
        array = folder.create_array(
            name,
            shape=values.shape,
            chunks=(1, *values.shape[1:]),
            dtype=values.dtype,
            compressors=[Crc32cCodec()],
            fill_value=0,
            dimension_names=_DIMENSIONS[name],
        )
        array[...] = values


def read_codec(root: Path, group: str, manifest: FeatureManifest, read: ReadFiles) -> Codec:
    """The codec that a manifest names, with its fitted arrays if it has any.

    Args:
        root: of the store.
        group: name of its Zarr group.
        read: reads files of the store by name.

    Raises:
        InputError: the arrays are not those that the manifest names.
    """
    spec, identity = manifest.codec, manifest.identity
    num_layers, width = len(identity.layers), identity.model.width
    parameters: dict[str, np.ndarray] = {}
    if spec.fit is not None:
        folder = f"{group}/{PARAMETERS}"
        parameters = {
            name: read_plain(root, f"{folder}/{name}", (num_layers, *shape), dtype, read)
            for name, (shape, dtype) in fitted_arrays(spec, width).items()
        }
        if digest_parameters(parameters) != spec.fit.sha256:
            raise StoreError(
                f"{root / folder} does not hold the fitted parameters of the codec (its sha256 is "
                "not the manifest's); put it back from a copy"
            )
    return open_codec(spec, identity.layers, width, parameters)
