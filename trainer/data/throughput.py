"""A warning when training waits for data."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_WAIT_SHARE = 0.01
"""Of the time of steps; more is worth a warning."""
MIN_SECONDS, MIN_BATCHES = 5.0, 20
"""What a share of waiting is measured over at least."""


@dataclass
class InputStallMonitor:
    """How long a consumer waited for batches, and how much they were.

    Attributes:
        workers: threads that read.
        wait_seconds: so far.
        num_rows, num_samples: of all batches so far.
    """

    workers: int
    wait_seconds: float = 0.0
    num_rows: int = 0
    num_samples: int = 0
    _since: list[float] = field(default_factory=list)
    _batches: int = 0
    _warned: bool = False

    def add(self, waited: float, num_rows: int, num_samples: int) -> None:
        """One batch more."""
        self.wait_seconds += waited
        self.num_rows += num_rows
        self.num_samples += num_samples
        self._batches += 1
        if not self._since:  # the first is waited for by everyone
            self._restart()

    def _restart(self) -> None:
        self._since = [
            time.perf_counter(),
            self.wait_seconds,
            self.num_rows,
            self.num_samples,
        ]
        self._batches = 0

    def warning(self, stored_bytes: Callable[[float, float], float]) -> str | None:
        """What to tell of the time since the last question, once: data came too late, and how much
        is lacking. None where it came in time, or it is too early to say.

        Args:
            stored_bytes: what so many rows and samples are in the stores.
        """
        if not self._since:
            return None
        seconds = time.perf_counter() - self._since[0]
        if seconds < MIN_SECONDS or self._batches < MIN_BATCHES or self._warned:
            return None
        _, waited, rows, samples = self._since
        share = (self.wait_seconds - waited) / seconds
        rows, samples = self.num_rows - rows, self.num_samples - samples
        self._restart()
        if share <= MAX_WAIT_SHARE:
            return None
        delivered = stored_bytes(rows, samples) / seconds
        self._warned = True
        needed = delivered / max(1e-9, 1 - share)
        threads = "1 thread" if self.workers == 1 else f"{self.workers} threads"
        return (
            f"warning: {share:.0%} of the time was spent waiting for data. Training needs "
            f"{needed / 1e6:,.1f} MB/s of the stores; {threads} delivered {delivered / 1e6:,.1f}. "
            "Try more data.workers; where the disk is the limit, a smaller codec (semroute rewrite "
            "--codec delta) or data.order=shards; where decoding is, codec bf16 or fewer layers."
        )
