"""A warning when training waits for data."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

MAX_WAIT_SHARE = 0.01
"""Share of the time spent waiting above which a warning is due."""
MIN_SECONDS, MIN_BATCHES = 5.0, 20
"""Shortest interval over which that share is measured."""


class _Snapshot(NamedTuple):
    """A moment and the totals at it."""

    time: float
    wait_seconds: float
    num_rows: int
    num_samples: int


@dataclass
class InputStallMonitor:
    """Time that a consumer waited for batches, and what was delivered.

    Attributes:
        workers: threads that read.
        wait_seconds: total so far.
        num_rows, num_samples: totals over all batches so far.
    """

    workers: int
    wait_seconds: float = 0.0
    num_rows: int = 0
    num_samples: int = 0
    _start: _Snapshot | None = None
    _num_batches: int = 0
    _warned: bool = False

    def add(self, waited: float, num_rows: int, num_samples: int) -> None:
        """Record one batch."""
        self.wait_seconds += waited
        self.num_rows += num_rows
        self.num_samples += num_samples
        self._num_batches += 1
        if self._start is None:  # measured from the second batch on: everyone waits for the first
            self._restart()

    def _restart(self) -> None:
        self._start = _Snapshot(
            time.perf_counter(), self.wait_seconds, self.num_rows, self.num_samples
        )
        self._num_batches = 0

    def warning(self, stored_bytes: Callable[[float, float], float]) -> str | None:
        """A warning that data came too late since the last call, with the throughput that is
        missing; at most once. None where data was in time, or it is too early to tell.

        Args:
            stored_bytes: bytes that so many rows and samples take in the stores.
        """
        start = self._start
        if start is None or self._warned:
            return None
        seconds = time.perf_counter() - start.time
        if seconds < MIN_SECONDS or self._num_batches < MIN_BATCHES:
            return None
        share = (self.wait_seconds - start.wait_seconds) / seconds
        rows, samples = self.num_rows - start.num_rows, self.num_samples - start.num_samples
        self._restart()
        if share <= MAX_WAIT_SHARE:
            return None
        self._warned = True
        delivered = stored_bytes(rows, samples) / seconds
        needed = delivered / max(1e-9, 1 - share)
        threads = "1 thread" if self.workers == 1 else f"{self.workers} threads"
        return (
            f"warning: {share:.0%} of the time was spent waiting for data. Training needs "
            f"{needed / 1e6:,.1f} MB/s of the stores; {threads} delivered {delivered / 1e6:,.1f}. "
            "Try more data.workers; where the disk is the limit, a smaller codec (semroute rewrite "
            "--codec delta) or data.order=shards; where decoding is, codec bf16 or fewer layers."
        )
