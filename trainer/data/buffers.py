"""Reused batch buffers."""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

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


def allocate_codes(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """:func:`allocate` for codes."""
    return allocate(shape, torch.from_numpy(np.empty(0, dtype)).dtype).numpy()


class BufferPool:
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


_buffers = BufferPool()
