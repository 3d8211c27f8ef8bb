"""What a stream delivers into, and whether it delivers in time."""

import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

MAX_WAIT_SHARE = 0.01
"""Of the time of steps; more is worth a warning."""
MIN_SECONDS, MIN_BATCHES = 5.0, 20
"""What a share of waiting is measured over at least."""
MAX_FREE = 8
"""Buffers that are kept for later though nobody uses them."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with any numbers in it, in memory that was used before where there is
    some: new pages cost as much as a copy.

    Pinned where there is CUDA, by torch's own allocator, which keeps what is freed until copies
    from it have ended; but not in workers of a ``DataLoader``, each of which would begin CUDA for
    it. Otherwise memory comes back when the last tensor that shares it is gone, so nothing that is
    still looked at is ever written over.
    """
    if torch.cuda.is_available() and get_worker_info() is None:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_buffers.lend(num_bytes)).view(dtype).view(shape)


def allocate_plane(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """:func:`allocate` for codes."""
    return allocate(shape, torch.from_numpy(np.empty(0, dtype)).dtype).numpy()


class Buffers:
    """Memory that is lent and comes back by itself."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> np.ndarray:
        """uint8 ``[num_bytes]``; free again once nothing refers to it."""
        with self._lock:
            fitting = [n for n, buffer in enumerate(self._free) if len(buffer) >= num_bytes]
            best = min(fitting, key=lambda n: len(self._free[n]), default=None)
            found = self._free.pop(best) if best is not None else None
        if found is None or len(found) > 4 * num_bytes + 4096:
            if found is not None:
                self._take_back(found)
            found = np.empty(num_bytes + num_bytes // 8, np.uint8)  # batches differ in length
        lent = found[:num_bytes]
        weakref.finalize(lent, self._take_back, found).atexit = False
        return lent

    def _take_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            del self._free[:-MAX_FREE]


_buffers = Buffers()


@dataclass
class Meter:
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
