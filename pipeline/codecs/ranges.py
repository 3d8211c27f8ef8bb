"""Ranges of mapped files, asked of the disk before they are read, and brought in without the GIL.

A page fault on a mapped file waits for the disk, one after the other, and the kernel reads around
it what nobody needs. So whatever a batch needs is requested first, all at once, and only then
touched. Addresses are only ever given to the kernel, which refuses those that are not mapped.
"""

import mmap
from typing import Any

import numpy as np
from numba.core import types

from .loops import compiled

_PAGES = 4096
"""Pages whose residency is asked for at a time."""
_WILLNEED = np.int32(mmap.MADV_WILLNEED)
_PAGE = mmap.PAGESIZE

_mincore: Any = types.ExternalFunction(
    "mincore", types.int32(types.uintp, types.uintp, types.uintp)
)
_madvise: Any = types.ExternalFunction(
    "madvise", types.int32(types.uintp, types.uintp, types.int32)
)


def request_ranges(starts: np.ndarray, stops: np.ndarray, known: np.ndarray) -> None:
    """Ask the kernel to read ranges of mapped files into the page cache; do not wait for it.

    Args:
        starts, stops: addresses of the first byte of each range and the byte after its last, int64
            ``[ranges]``; those next to each other are requested together.
        known: whether the kernel tells this process which pages of the range are in memory, bool
            ``[ranges]``: those are not requested again, which would take a fifth of the time of
            copying them.
    """
    if not len(starts):
        return
    apart = np.concatenate([[True], starts[1:] != stops[:-1]])
    last = np.concatenate([apart[1:], [True]])
    _request(starts[apart], stops[last], known[apart])


@compiled
def _request(starts, stops, known):  # type: ignore[no-untyped-def]
    resident = np.empty(_PAGES, np.uint8)
    for part in range(len(starts)):
        first = starts[part] - starts[part] % _PAGE
        while first < stops[part]:
            size = min(stops[part] - first, _PAGES * _PAGE)
            pages = (size + _PAGE - 1) // _PAGE
            missing = True
            if known[part]:
                asked = _mincore(np.uintp(first), np.uintp(size), np.uintp(resident.ctypes.data))
                missing = asked != 0
                for page in range(pages):
                    missing |= resident[page] & 1 == 0
            if missing:
                _madvise(np.uintp(first), np.uintp(size), _WILLNEED)
            first += size


@compiled
def touch_ranges(source, starts, stops):  # type: ignore[no-untyped-def]
    """Wait until ranges of mapped bytes are in memory, without the GIL.

    Args:
        source: uint8 ``[bytes]``.
        starts, stops: in bytes, int64 ``[ranges]``; what is outside of ``source`` is left out.

    Returns:
        A number without a meaning, for which every page is read.
    """
    total = 0
    for part in range(len(starts)):
        stop = min(stops[part], len(source))
        for place in range(max(0, starts[part]), stop, _PAGE):
            total += source[place]
        if stop > 0 and starts[part] < stop:
            total += source[stop - 1]
    return total
