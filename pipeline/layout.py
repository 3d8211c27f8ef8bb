"""Where every row goes: captions -> shards, rows, chunks and batches. Pure arithmetic."""

import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..schemas import InputError, Layout

MAX_ROWS_PER_CHUNK = 8
"""Unit of read: small against a caption of 5 to 100 tokens, so that little is read in vain."""
CHUNK_BYTES = 262_144
"""Uncompressed: a chunk's own cost (a table of zstd's, a look-up) is little against so much. Of a
large LLM it is a token or two."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Packing:
    """Entries dealt to shards, none across a boundary.

    Attributes:
        layout: shapes of the arrays.
        shard: shard of each entry, int32 ``[entries]``.
        row_start: first row of each entry, int64 ``[entries]``; its rows are consecutive.
        num_rows: rows of each entry, int64 ``[entries]``.
    """

    layout: Layout
    shard: np.ndarray
    row_start: np.ndarray
    num_rows: np.ndarray

    def entries(self, shard: int) -> range:
        """Entries of a shard; they are consecutive."""
        first, stop = np.searchsorted(self.shard, [shard, shard + 1])
        return range(int(first), int(stop))

    def work(self) -> dict[int, tuple[int, int]]:
        """Shard -> its entries and rows."""
        entries = np.bincount(self.shard, minlength=self.layout.num_shards).tolist()
        rows = np.bincount(self.shard, self.num_rows, minlength=self.layout.num_shards)
        return dict(enumerate(zip(entries, rows.astype(np.int64).tolist(), strict=True)))


def rows_of(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows of entries, one entry after the other: int64 ``[sum(counts)]``."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def parse_bytes(text: str) -> int:
    """``"256MB"`` -> 256,000,000; ``"1GiB"`` -> 1,073,741,824.

    Raises:
        InputError: not a positive number with a known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    num_bytes = int(float(match[1]) * unit) if match and unit else 0
    if num_bytes <= 0:
        raise InputError(
            f"{text!r} is no size; expected a number and a unit, such as 256MB or 1GiB"
        )
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """``256000000`` -> ``"256.0 MB"``."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def choose_rows_per_chunk(bytes_per_row: int) -> int:
    """As many rows as ``CHUNK_BYTES`` hold, at least 1, at most 8."""
    return max(1, min(MAX_ROWS_PER_CHUNK, round(CHUNK_BYTES / bytes_per_row)))


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
    """Deal entries to shards in the order given; a shard ends where the next does not fit.

    Args:
        num_rows: rows of each entry, ``[entries]``, all positive.
        bytes_per_row: uncompressed.
        shard_bytes: wanted size of a full shard; rounded down to whole chunks, and up to hold the
            longest entry.
        batch_tokens, num_threads: recorded in the layout, where workers find them.
        rows_per_chunk: default as :func:`choose_rows_per_chunk`.
        aligned: begin every entry at a chunk. Zeros between entries are free under compression, and
            no entry's chunk holds another's rows, which would be decompressed in vain.
        earlier: entries that there were each time before a store grew, ascending. The next entry
            begins a shard, and the size of shards is that of the first generation.
        breaks: other entries that begin a shard, as they are of another kind than those before.

    Raises:
        InputError: an entry of a later generation does not fit into a shard.
    """
    if rows_per_chunk is None:
        rows_per_chunk = choose_rows_per_chunk(bytes_per_row)
    used = np.asarray(num_rows, np.int64)
    num_rows = -(-used // rows_per_chunk) * rows_per_chunk if aligned else used
    stops_of_generations = [*earlier, len(num_rows)]
    first_rows = num_rows[: stops_of_generations[0]]
    total = int(first_rows.sum())
    wanted = shard_bytes // (bytes_per_row * rows_per_chunk)
    needed = -(-int(first_rows.max()) // rows_per_chunk)
    enough = -(-total // rows_per_chunk)
    rows_per_shard = max(needed, min(wanted, enough)) * rows_per_chunk
    if num_rows.max() > rows_per_shard:
        raise InputError(
            f"an entry of {used[num_rows.argmax()]} rows does not fit into a shard, which has "
            f"{rows_per_shard} rows since the store was begun; make a new store"
        )

    stops = np.cumsum(num_rows)
    shard = np.empty(len(num_rows), np.int32)
    row_start = np.empty(len(num_rows), np.int64)
    ends = sorted({*stops_of_generations, *(each for each in breaks if each)})
    first, num_shards = 0, 0
    while first < len(num_rows):
        before = stops[first] - num_rows[first]
        end = ends[bisect_right(ends, first)]
        stop = min(end, int(np.searchsorted(stops, before + rows_per_shard, side="right")))
        shard[first:stop] = num_shards
        row_start[first:stop] = (
            num_shards * rows_per_shard + stops[first:stop] - num_rows[first:stop] - before
        )
        first, num_shards = stop, num_shards + 1
    layout = Layout(
        num_shards=num_shards,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        num_rows=int(used.sum()),
        batch_tokens=batch_tokens,
        num_threads=num_threads,
    )
    return Packing(layout, shard, row_start, used)


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the LLM together.

    Attributes:
        entries: indices of the sequences, int64 ``[n]``.
        line: of the batch, in which each stands, int64 ``[n]`` ascending from 0. Padded, each has
            its own; packed, several stand in one, one after the other.
    """

    entries: np.ndarray
    line: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def halves(self) -> "tuple[Batch, Batch]":
        """The same in two batches, of whole lines where it has two; of two sequences at least."""
        middle = (int(self.line[-1]) + 1) // 2
        cut = int(np.searchsorted(self.line, middle)) if middle else len(self) // 2
        line = self.line[cut:]
        return (
            Batch(self.entries[:cut], self.line[:cut]),
            Batch(self.entries[cut:], line - line[0]),
        )


def batches(
    lengths: np.ndarray, batch_tokens: int, line_tokens: int | None = None
) -> Iterator[Batch]:
    """Split sequences into batches: of similar length each in its own line, or packed into lines.

    A pure function of the lengths: batch composition changes bits, and a shard that is encoded
    again must give the same bytes.

    Args:
        lengths: tokens of each sequence, ``[n]``, all positive.
        batch_tokens: at most this many tokens a batch, padding included; a longer sequence is a
            batch by itself.
        line_tokens: fill lines of so many tokens, or as many as the longest sequence that is left
            has, each with the longest that fits until none does; None: a line a sequence.

    Yields:
        Every sequence once; the longest begins the first line.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    if line_tokens is not None:
        yield from _packed(lengths, order, batch_tokens, line_tokens)
        return
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // int(lengths[order[first]]))
        entries = order[first : first + size]
        yield Batch(entries, np.arange(len(entries)))
        first += size


def _packed(
    lengths: np.ndarray, order: np.ndarray, batch_tokens: int, line_tokens: int
) -> Iterator[Batch]:
    waiting: dict[int, deque[int]] = {}  # length -> those that have it
    for entry in order.tolist():
        waiting.setdefault(int(lengths[entry]), deque()).append(entry)
    sizes = sorted(waiting)
    while sizes:
        width = max(line_tokens, sizes[-1])
        entries: list[int] = []
        line: list[int] = []
        for number in range(max(1, batch_tokens // width)):
            room = width
            while fitting := bisect_right(sizes, room):
                size = sizes[fitting - 1]
                entries.append(waiting[size].popleft())
                line.append(number)
                room -= size
                if not waiting[size]:
                    sizes.remove(size)
        yield Batch(np.array(entries), np.array(line))
