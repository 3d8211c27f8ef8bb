"""Shard and rows of each caption or image: pure arithmetic."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...schemas import InputError, Layout
from ..codecs.chunks import choose_rows_per_chunk


@dataclass(frozen=True)
class Packing:
    """Entries (captions or images) assigned to shards, none across a boundary.

    Attributes:
        layout: shapes of the arrays.
        shard: shard of each entry, int32 ``[entries]``.
        row_start: first row of each entry, int64 ``[entries]``; its rows are consecutive.
        num_rows: number of rows of each entry, int64 ``[entries]``.
    """

    layout: Layout
    shard: np.ndarray
    row_start: np.ndarray
    num_rows: np.ndarray

    def entries(self, shard: int) -> range:
        """Entries of a shard, which are consecutive."""
        first, stop = np.searchsorted(self.shard, [shard, shard + 1])
        return range(int(first), int(stop))

    def work(self) -> dict[int, tuple[int, int]]:
        """Shard -> number of its entries and rows."""
        entries = np.bincount(self.shard, minlength=self.layout.num_shards).tolist()
        rows = np.bincount(self.shard, self.num_rows, minlength=self.layout.num_shards)
        return dict(enumerate(zip(entries, rows.astype(np.int64).tolist(), strict=True)))


def rows_of(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows of entries, one entry after the other: int64 ``[sum(counts)]``.

    Entries of 2, 1 and 3 rows that start at rows 10, 20 and 30::

        starts              10     20  30
        before              0      2   3        rows of earlier entries
        arange              0  1   2   3  4  5
        + starts - before   10 11  20  30 31 32
    """
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def pack(
    num_rows: np.ndarray,
    *,
    bytes_per_row: int,
    shard_bytes: int,
    batch_tokens: int,
    rows_per_chunk: int | None = None,
    aligned: bool = False,
    num_threads: int = 1,
    earlier: Sequence[int] = (),
    breaks: Sequence[int] = (),
) -> Packing:
    """Assign entries to shards in the given order; a shard ends when the next entry does not fit.

    Args:
        num_rows: rows of each entry, ``[entries]``, all positive.
        bytes_per_row: uncompressed.
        shard_bytes: requested size of a full shard; rounded down to whole chunks, and up to hold
            the longest entry.
        batch_tokens, num_threads: recorded in the layout, where workers find them.
        rows_per_chunk: default as :func:`choose_rows_per_chunk`; of a store that is begun, its own.
        aligned: begin every entry at a chunk. Zeros between entries are free under compression, and
            a chunk never holds rows of two entries, which would be decompressed in vain.
        earlier: number of entries each time before the store grew, ascending. The next entry begins
            a shard, and shards have the size of the first generation's.
        breaks: other entries that begin a shard, since they are of another kind than those before.

    Raises:
        InputError: an entry of a later generation does not fit into a shard.
    """
    if rows_per_chunk is None:
        rows_per_chunk = choose_rows_per_chunk(bytes_per_row, aligned=aligned)
    used = np.asarray(num_rows, np.int64)
    num_rows = -(-used // rows_per_chunk) * rows_per_chunk if aligned else used
    stops_of_generations = [*earlier, len(num_rows)]
    first_rows = num_rows[: stops_of_generations[0]]
    # In chunks: the requested size, what the longest entry needs, and what all entries need.
    requested = shard_bytes // (bytes_per_row * rows_per_chunk)
    longest = -(-int(first_rows.max()) // rows_per_chunk)
    total = -(-int(first_rows.sum()) // rows_per_chunk)
    rows_per_shard = max(longest, min(requested, total)) * rows_per_chunk
    if num_rows.max() > rows_per_shard:
        raise InputError(
            f"an entry of {used[num_rows.argmax()]} rows does not fit into a shard, which has "
            f"{rows_per_shard} rows since the store was created; make a new store"
        )
    ends = sorted({*stops_of_generations, *(each for each in breaks if each)})
    shard, row_start = _assign(num_rows, rows_per_shard, ends)
    layout = Layout(
        num_shards=int(shard[-1]) + 1,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        num_rows=int(used.sum()),
        batch_tokens=batch_tokens,
        num_threads=num_threads,
    )
    return Packing(layout, shard, row_start, used)


def _assign(
    num_rows: np.ndarray, rows_per_shard: int, ends: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Shard and first row of each entry.

    Entries of 3, 4 and 2 rows in shards of 8 rows::

        entry    0      1         2
        shard    0      0         1
        row      0 1 2  3 4 5 6   8 9      (row 7 is not used)

    Args:
        ends: entries that begin a shard in any case, ascending; the last is the number of entries.
    """
    stops = np.cumsum(num_rows)
    shard = np.empty(len(num_rows), np.int32)
    row_start = np.empty(len(num_rows), np.int64)
    first, number = 0, 0
    while first < len(num_rows):
        before = stops[first] - num_rows[first]
        end = ends[bisect_right(ends, first)]
        stop = min(end, int(np.searchsorted(stops, before + rows_per_shard, side="right")))
        shard[first:stop] = number
        row_start[first:stop] = (
            number * rows_per_shard + stops[first:stop] - num_rows[first:stop] - before
        )
        first, number = stop, number + 1
    return shard, row_start
