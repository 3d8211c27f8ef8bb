"""Reads slices of chunks of a codec's arrays, and decodes them in blocks, on several threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..codecs.base import Codec
from .array import ShardedArray
from .shard_file import ChunkSlices

BLOCK_BYTES = 4_000_000
"""Decoded bytes of a block, which one thread reads and decodes at a time."""
Allocator = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Returns memory of a shape and dtype, not initialised."""


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


def read_codes(
    arrays: Mapping[str, ShardedArray],
    slices: ChunkSlices,
    num_rows: int,
    depths: Mapping[str, int],
    empty: Allocator = np.empty,
) -> dict[str, np.ndarray]:
    """Codes by array, ``[num_rows, depth, size]`` each.

    Args:
        depths: how many of its lowest layers are read of an array; others are not read.
    """
    codes = {}
    for name, depth in depths.items():
        array = arrays[name]
        codes[name] = empty((num_rows, depth, array.row_shape[1]), array.dtype)
        array.read_slices(slices, codes[name], slice(depth))
    return codes
