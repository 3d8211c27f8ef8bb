"""How loops are compiled, and run in threads.

Compiled code is cached on disk where a folder can be written. It releases the GIL.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba

MIN_PART_ROWS = 64
"""Fewest rows that are worth a thread."""


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function, and cache the code for the next process where a folder can be written.

    Nothing is checked before a division (``error_model``): a check would keep a loop from being
    vectorised.
    """
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the home directory can be written
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


def summing(function: Callable[..., Any]) -> Any:
    """Compile a sum in any order, and so vectorised; of NaN the result is undefined."""
    return compiled(function, fastmath={"reassoc", "nsz", "nnan"})


def adding(function: Callable[..., Any]) -> Any:
    """Compile a sum of products in any order, with fused multiplications and additions: exact for
    integers whose sums are below 2**24, so that the order cannot be seen."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def in_parts(function: Callable[[slice], None], num_rows: int) -> None:
    """Call a compiled loop for slices of all rows, in as many threads as torch would use."""
    import torch

    parts = max(1, min(torch.get_num_threads(), num_rows // MIN_PART_ROWS))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    slices = [slice(*pair) for pair in pairwise(bounds)]
    if parts == 1:
        function(slices[0])
        return
    for _ in _threads(torch.get_num_threads()).map(function, slices):
        pass


@lru_cache(maxsize=1)
def _threads(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num)
