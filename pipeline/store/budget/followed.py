"""A store with a disk budget as a run reads it: reading waits for shards that are not on disk."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ....schemas import FeatureManifest, InputError
from ..features import Codes, FeatureStore, Rows
from ..open import open_features

T = TypeVar("T")
POLL_SECONDS = (0.01, 0.2)
"""First and longest pause between two looks for a shard."""
IDLE_READS = 256
"""A shard that so many reads did not need is closed."""


class WaitEndedError(Exception):
    """Somebody asked for the end of a wait, such as Ctrl-C."""


class FollowedFeatureStore(FeatureStore):
    """A feature store with a disk budget, to be read in the order that extraction follows.

    Attributes:
        stops: events, any of which ends all waits.
        waited_seconds: time that reading has waited for shards so far, over all threads.
    """

    def __init__(self, path: Path, manifest: FeatureManifest) -> None:
        super().__init__(path, manifest)
        self.stops: list[threading.Event] = []
        self.waited_seconds = 0.0
        self._waits: dict[int, list[int]] = {}  # thread -> shards
        self._lock = threading.Lock()
        self._num_reads = 0
        self._last_read: dict[int, int] = {}  # shard -> number of the read

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
        self.row_spans(ids)  # refuses numbers that are none
        shards = np.unique(self._shard_of[np.asarray(ids, np.int64)]).tolist()
        self._note(shards)
        while True:
            self._wait(shards)
            try:
                return read()
            except InputError as error:
                if not isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                    raise

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
        thread, began = threading.get_ident(), time.perf_counter()
        with self._lock:
            self._waits[thread] = shards
        try:
            yield
        finally:
            with self._lock:
                del self._waits[thread]
                self.waited_seconds += time.perf_counter() - began

    def is_on_disk(self, shard: int) -> bool:
        """Whether a shard can be read. A file is there whole or not at all."""
        return all(os.path.exists(f"{self.path}/{name}") for name in self.shard_files(shard))

    def forget_evicted(self) -> None:
        """Close files that were evicted, so that the disk gets their space back."""
        opened = {shard for array in self.arrays.values() for shard in array.open_shards()}
        for shard in opened:
            idle = self._num_reads - self._last_read.get(shard, 0) > IDLE_READS
            if idle or not self.is_on_disk(shard):
                for array in self.arrays.values():
                    array.forget(shard)

    def _note(self, shards: Sequence[int]) -> None:
        with self._lock:
            self._num_reads += 1
            self._last_read |= dict.fromkeys(shards, self._num_reads)

    @cached_property
    def _shard_of(self) -> np.ndarray:
        """Shard of each caption, int32 ``[captions]``."""
        return np.asarray(self.captions["shard"].to_numpy())


def open_followed(path: str | os.PathLike[str]) -> FeatureStore:
    """Open a feature store to train on: a complete one, or one with a disk budget.

    Raises:
        StoreError: as :meth:`.Store.open`.
    """
    store = open_features(path, complete=False)
    if not store.has_budget:
        store.check_complete()
        store.check()
        return store
    followed = FollowedFeatureStore(store.path, store.manifest)
    followed.check()
    return followed
