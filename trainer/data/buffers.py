"""Reused memory for batches."""

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

MAX_FREE = 8
"""Unused buffers that are kept for later."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in reused memory where possible: new pages cost as much
    as a copy.

    With CUDA it is pinned, by torch's own allocator, which does not reuse memory before copies from
    it have ended; but not in workers of a ``DataLoader``, each of which would initialise CUDA for
    it. Otherwise memory returns to the pool when the last tensor that shares it is gone, so nothing
    that is still in use is overwritten.
    """
    if torch.cuda.is_available() and get_worker_info() is None:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(_pool.lend(num_bytes)).view(dtype).view(shape)


def allocated(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU in memory of :func:`allocate`; by numpy, on one thread."""
    copy = allocate(tuple(tensor.shape), tensor.dtype)
    if tensor.numel():
        whole = copy.reshape(-1).view(torch.uint8).numpy()
        whole[:] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return copy


def allocate_codes(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """:func:`allocate` for codes, as an array of numpy."""
    return allocate(shape, torch.from_numpy(np.empty(0, dtype)).dtype).numpy()


class BufferPool:
    """Memory that is lent, and returns by itself once nothing refers to it."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def lend(self, num_bytes: int) -> np.ndarray:
        """uint8 ``[num_bytes]``, the start of the smallest free buffer that is large enough; of a
        new one where that would waste more than three quarters."""
        with self._lock:
            fitting = [n for n, buffer in enumerate(self._free) if len(buffer) >= num_bytes]
            best = min(fitting, key=lambda n: len(self._free[n]), default=None)
            buffer = self._free.pop(best) if best is not None else None
        if buffer is None or len(buffer) > 4 * num_bytes + 4096:
            if buffer is not None:
                self._take_back(buffer)
            buffer = np.empty(num_bytes + num_bytes // 8, np.uint8)  # batches differ in length
        lent = buffer[:num_bytes]
        weakref.finalize(lent, self._take_back, buffer).atexit = False
        return lent

    def _take_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            del self._free[:-MAX_FREE]


_pool = BufferPool()
