"""What a disk delivers to random requests, measured on files that are there."""

from __future__ import annotations

import mmap
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .errors import InputError
from .files import is_local, list_files, locate
from .units import format_bytes

SECONDS = 2.0
THREADS = 16
MIN_BYTES = 64_000_000
"""Fewest bytes of files that say something about a disk."""
_BLOCK, _MAX_FILES = 4096, 256


@dataclass(frozen=True)
class StorageSpeed:
    """Random requests, many at once, past the page cache.

    Attributes:
        bytes_per_second: that were delivered.
        request_bytes: size of each.
    """

    bytes_per_second: float
    request_bytes: int

    def compare(self, needed: float | None) -> str:
        """The speed, and whether it suffices for so many bytes per second."""
        speed = format_bytes(int(self.bytes_per_second))
        text = f"{speed}/s in random requests of {format_bytes(self.request_bytes)}, uncached"
        if needed is None:
            return text
        ratio = self.bytes_per_second / needed
        if ratio < 1:
            return f"{text}: TOO SLOW, {ratio:.0%} of what training reads"
        return f"{text}: {ratio:.3g}x what training reads"


def measure_storage(
    folder: str | os.PathLike[str], request_bytes: int, seconds: float = SECONDS
) -> StorageSpeed | None:
    """Read random parts of the files of a folder, past the page cache; nothing is written.

    Args:
        folder: a store, or any folder on the same disk.
        request_bytes: size of a request; rounded up to whole blocks of 4 KB.

    Returns:
        None: the files are fewer than ``MIN_BYTES`` or smaller than a request, are objects behind a
        URL, or are on a file system that cannot bypass its cache (tmpfs).

    Raises:
        InputError: no such folder.
    """
    path = locate(folder)
    if not is_local(path):
        return None
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; name one on the disk to be measured")
    size = max(1, -(-request_bytes // _BLOCK)) * _BLOCK
    files = {
        path / name: entry.num_bytes // _BLOCK
        for name, entry in list_files(path).items()
        if entry.num_bytes >= size
    }
    if sum(files.values()) * _BLOCK < MIN_BYTES:
        return None
    descriptors = []
    try:
        for name in [*files][:_MAX_FILES]:
            descriptors.append(os.open(name, os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW))
        return _measure(descriptors, [*files.values()], size, seconds)
    except OSError:
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _measure(
    descriptors: list[int], num_blocks: list[int], size: int, seconds: float
) -> StorageSpeed:
    began = time.perf_counter()

    def read(seed: int) -> int:
        generator, total = random.Random(seed), 0
        with mmap.mmap(-1, size) as buffer:  # O_DIRECT needs memory at a page
            while not total or time.perf_counter() < began + seconds:
                number = generator.randrange(len(descriptors))
                block = generator.randrange(num_blocks[number] - size // _BLOCK + 1)
                total += os.preadv(descriptors[number], [buffer], block * _BLOCK)
        return total

    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, range(THREADS)))
    return StorageSpeed(total / (time.perf_counter() - began), size)
