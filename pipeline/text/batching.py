"""Captions as batches of an LLM: padded, or packed several to a row."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the LLM together.

    Attributes:
        entries: indices of the sequences, int64 ``[n]``.
        row: the row of the batch in which each sequence stands, int64 ``[n]`` ascending from 0.
            Padded, each sequence has its own row; packed, several share one, one after the other.
    """

    entries: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.entries)

    def halves(self) -> "tuple[Batch, Batch]":
        """Two batches with half of the rows each, or of the only row half of its sequences.

        Two sequences at least are needed.
        """
        middle = (int(self.row[-1]) + 1) // 2
        cut = int(np.searchsorted(self.row, middle)) if middle else len(self) // 2
        row = self.row[cut:]
        return (
            Batch(self.entries[:cut], self.row[:cut]),
            Batch(self.entries[cut:], row - row[0]),
        )


def batches(
    lengths: np.ndarray, batch_tokens: int, row_tokens: int | None = None
) -> Iterator[Batch]:
    """Split sequences into batches: padded to the longest of similar ones, or packed into rows.

    Four sequences of 4, 3, 2 and 1 tokens, the packed ones into rows of 5::

        padded     packed
        a a a a    a a a a d
        b b b .    b b b c c
        c c . .
        d . . .

    A pure function of the lengths: which sequences share a batch changes bits, and a shard that is
    encoded again must give the same bytes.

    Args:
        lengths: tokens of each sequence, ``[n]``, all positive.
        batch_tokens: at most this many tokens per batch, padding included; a longer sequence is a
            batch by itself.
        row_tokens: pack rows of so many tokens, or of as many as the longest remaining sequence
            has; each takes the longest sequence that fits until none does. None: one row per
            sequence.

    Yields:
        Every sequence once; the longest begins the first row.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    if row_tokens is not None:
        yield from _packed(lengths, order, batch_tokens, row_tokens)
        return
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // int(lengths[order[first]]))
        entries = order[first : first + size]
        yield Batch(entries, np.arange(len(entries)))
        first += size


def _packed(
    lengths: np.ndarray, order: np.ndarray, batch_tokens: int, row_tokens: int
) -> Iterator[Batch]:
    waiting: dict[int, deque[int]] = {}  # length -> the sequences that have it
    for entry in order.tolist():
        waiting.setdefault(int(lengths[entry]), deque()).append(entry)
    sizes = sorted(waiting)
    while sizes:
        width = max(row_tokens, sizes[-1])
        entries: list[int] = []
        rows: list[int] = []
        for row in range(max(1, batch_tokens // width)):
            if not sizes:
                break
            room = width
            while fitting := bisect_right(sizes, room):
                size = sizes[fitting - 1]
                entries.append(waiting[size].popleft())
                rows.append(row)
                room -= size
                if not waiting[size]:
                    sizes.remove(size)
        yield Batch(np.array(entries), np.array(rows))
