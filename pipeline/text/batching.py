"""Captions as batches of an LLM."""

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
