"""A store with a disk budget as a run reads it: reading waits for shards that are not on disk."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ....schemas import FeatureManifest, InputError
from ....schemas.interrupts import WaitEndedError
from ..features import Codes, FeatureStore, Rows

T = TypeVar("T")
POLL_SECONDS = (0.01, 0.2)
"""First and longest pause between two looks for a shard."""
IDLE_READS = 256
"""A shard that so many reads did not need is closed."""


class FollowedFeatureStore(FeatureStore):
    """A feature store with a disk budget, to be read in the order that extraction follows.

    Attributes:
        stops: events, any of which ends all waits.
    """

    def __init__(self, path: Path, manifest: FeatureManifest) -> None:
        super().__init__(path, manifest)
        self.stops: list[threading.Event] = []
        self._waits: dict[int, list[int]] = {}  # thread -> shards
        self._lock = threading.Lock()
        self._num_reads = 0
        self._last_read: dict[int, int] = {}  # shard -> number of the read
        self._users: Counter[int] = Counter()  # shard -> reads that are at work on it

    @property
    def waits_for(self) -> list[int]:
        """Shards that reading waits for now."""
        with self._lock:
            return sorted({shard for shards in self._waits.values() for shard in shards})

    def read(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> Rows:
        return self._once_there(
            ids, lambda: super(FollowedFeatureStore, self).read(ids, layers, out)
        )

    def read_padded(
        self, ids: Sequence[int] | np.ndarray, *args: Any, **options: Any
    ) -> np.ndarray:
        return self._once_there(
            ids,
            lambda: super(FollowedFeatureStore, self).read_padded(ids, *args, **options),
        )

    def read_codes(self, ids: Sequence[int] | np.ndarray, *args: Any, **options: Any) -> Codes:
        return self._once_there(
            ids, lambda: super(FollowedFeatureStore, self).read_codes(ids, *args, **options)
        )

    def _once_there(self, ids: Sequence[int] | np.ndarray, read: Callable[[], T]) -> T:
        """Read captions once their shards are on disk, and again if one goes in between.

        Raises:
            WaitEndedError: one of :attr:`stops` is set.
        """
        shards = self._shards_of(ids).tolist()
        while True:
            self._wait(shards)
            try:
                with self._using(shards):
                    return read()
            except InputError as error:
                if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                    raise

    def request(self, ids: Sequence[int] | np.ndarray, layers: Sequence[int] | None = None) -> None:
        """As of any store, of captions whose shards are on disk."""
        there = [shard for shard in self._shards_of(ids).tolist() if self.is_on_disk(shard)]
        wanted = np.asarray(ids, np.int64)
        wanted = wanted[np.isin(self._shard_of[wanted], there)]
        with suppress(InputError), self._using(there):  # one may be evicted just now
            super().request(wanted, layers)

    def _shards_of(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Shards of captions, ascending, each once."""
        self.row_spans(ids)  # refuses numbers that are none
        return np.unique(self._shard_of[np.asarray(ids, np.int64)])

    @contextmanager
    def _using(self, shards: list[int]) -> Iterator[None]:
        """Keep files of shards open: other threads do not forget them meanwhile."""
        with self._lock:
            self._num_reads += 1
            self._last_read |= dict.fromkeys(shards, self._num_reads)
            self._users.update(shards)
        try:
            yield
        finally:
            with self._lock:
                self._users.subtract(shards)

    def _wait(self, shards: Sequence[int]) -> None:
        self.forget_evicted()
        missing = [shard for shard in shards if not self.is_on_disk(shard)]
        if not missing:
            return
        with self._waiting(missing):
            pause, longest = POLL_SECONDS
            while missing:
                if any(stop.is_set() for stop in self.stops):
                    raise WaitEndedError(f"stopped waiting for shard {missing[0]} of {self.path}")
                time.sleep(pause)
                pause = min(2 * pause, longest)
                self.forget_evicted()
                missing = [shard for shard in missing if not self.is_on_disk(shard)]

    @contextmanager
    def _waiting(self, shards: list[int]) -> Iterator[None]:
        thread = threading.get_ident()
        with self._lock:
            self._waits[thread] = shards
        try:
            yield
        finally:
            with self._lock:
                del self._waits[thread]

    def is_on_disk(self, shard: int) -> bool:
        """Whether a shard can be read. A file is there whole or not at all."""
        return all(os.path.exists(f"{self.path}/{name}") for name in self.shard_files(shard))

    def forget_evicted(self) -> None:
        """Close files that were evicted, so that the disk gets their space back."""
        arrays = [*self.arrays.values()]
        for shard in {shard for array in arrays for shard in array.open_shards()}:
            idle = self._num_reads - self._last_read.get(shard, 0) > IDLE_READS
            if idle or not self.is_on_disk(shard):
                with self._lock:
                    if not self._users[shard]:
                        for array in arrays:
                            array.forget(shard)

    @cached_property
    def _shard_of(self) -> np.ndarray:
        """Shard of each caption, int64 ``[captions]``."""
        return self.shards()
