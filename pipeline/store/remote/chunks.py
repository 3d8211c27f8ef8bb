"""Chunks that are requested ahead, fetched by many transfers at once, and kept until they are read.

    request    chunks of a batch: neighbours become one transfer; returns at once
    take       waits for them
    hungry     whether more should be requested: ahead by time, whatever the number of batches

Of an array that is fetched whole, as for an order by shards, the rest of a shard follows in large
parts once its first chunk is requested, into the cache or into memory. There the shards that were
not asked for anything for longest make room: chunks of the others are still to be read, whenever
they came.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np

from ....schemas import InputError
from .cache import ChunkCache, ShardKey
from .clients import Client, Part
from .transfers import Task, TransferCounts, Transfers

if TYPE_CHECKING:
    from ..shard_file import ShardFile

AHEAD_SECONDS = 2.0
"""Time for which chunks are requested ahead, at the speed at which they are read."""
MIN_AHEAD_BYTES, MAX_AHEAD_BYTES = 32_000_000, 256_000_000
KEPT_BYTES = 64_000_000
"""Chunks that were read and are kept, as the null caption's are read again with every batch."""
PART_BYTES = 4_000_000
"""Largest part that is fetched by one transfer, unless a chunk is larger."""
GAP_BYTES = 32_768
"""Bytes between two chunks that are fetched in vain rather than by another transfer."""

Parts = dict[int, np.ndarray]
"""Number of a chunk, over all shards -> its bytes with its checksum, which fits; uint8."""


@dataclass
class _Entry:
    """A chunk that was requested."""

    task: Task
    num_bytes: int


class ReadAhead:
    """Chunks of any number of arrays, for the readers of one process.

    Args:
        cache: where chunks are kept on a disk of this machine.
        kept_bytes: of chunks in memory that were read already, or that came with their shard.

    Attributes:
        counts: of all transfers.
    """

    def __init__(self, cache: ChunkCache | None = None, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.counts = TransferCounts()
        self.transfers = Transfers(self.counts)
        self.cache = cache
        self._lock = RLock()
        self._ahead: dict[tuple[RemoteChunks, int], _Entry] = {}
        self._kept: OrderedDict[tuple[RemoteChunks, int], dict[int, _Entry]] = OrderedDict()
        self._ahead_bytes = self._kept_bytes = 0
        self._max_kept = kept_bytes
        self._begun: dict[tuple[RemoteChunks, int], list[Task]] = {}
        self._missed: set[tuple[RemoteChunks, int]] = set()

    def close(self) -> None:
        """Drop what waits; whoever waits for it gets an error."""
        self.transfers.close()

    def hungry(self) -> bool:
        """Whether fewer bytes are requested ahead than are read in :data:`AHEAD_SECONDS`."""
        wanted = self.transfers.pace() * AHEAD_SECONDS
        return self._ahead_bytes < min(max(wanted, MIN_AHEAD_BYTES), MAX_AHEAD_BYTES)

    def request(self, chunks: "RemoteChunks", numbers: np.ndarray) -> None:
        """Begin to fetch chunks that are not there yet; do not wait.

        Args:
            numbers: over all shards, ascending, each once.
        """
        for shard, own in chunks.by_shard(numbers):
            new = []
            with self._lock:
                for number in own:
                    if (chunks, number) in self._ahead:
                        continue
                    kept = self._drop(chunks, number)
                    if kept is None:
                        new.append(number)
                        continue
                    # It counts as requested wherever it was, or requests would run on through
                    # shards that are there.
                    self._expect(chunks, number, kept)
                    self._kept.move_to_end(chunks.group(number))
                    if not kept.task.future.done():
                        self.transfers.promote(kept.task)
                for part in chunks.parts(shard, new):
                    task = self.transfers.submit(partial(chunks.fetch, shard, part))
                    for number in part:
                        self._expect(chunks, number, _Entry(task, chunks.size(number)))
                if chunks.whole:
                    self._request_rest(chunks, shard)

    def _request_rest(self, chunks: "RemoteChunks", shard: int) -> None:
        """Request what else a shard has, for later; again if it has made room meanwhile."""
        begun, missed = self._begun.get((chunks, shard)), (chunks, shard) in self._missed
        if begun is not None and not (missed and all(task.future.done() for task in begun)):
            return
        self._missed.discard((chunks, shard))
        tasks = self._begun[chunks, shard] = []
        kept = self._kept.get((chunks, shard), {})
        rest = [
            number
            for number in chunks.stored(shard)
            if (chunks, number) not in self._ahead and number not in kept
        ]
        for part in chunks.parts(shard, rest):
            if self.cache is not None:
                run = partial(chunks.fill, shard, part)
                tasks.append(self.transfers.submit(run, background=True))
                continue
            task = self.transfers.submit(partial(chunks.fetch, shard, part), background=True)
            for number in part:
                self._keep(chunks, number, _Entry(task, chunks.size(number)))

    def missed(self, chunks: "RemoteChunks", shard: int) -> None:
        """A chunk of a shard was not in the cache."""
        if chunks.whole:
            with self._lock:
                self._missed.add((chunks, shard))

    def take(self, chunks: "RemoteChunks", numbers: np.ndarray) -> Parts:
        """Chunks, once they are there; those that are not stored are missing.

        Args:
            numbers: as for :meth:`request`.

        Raises:
            CorruptShardError: a chunk is not as it was written.
            StorageError: it cannot be read.
        """
        with self._lock:
            self.request(chunks, numbers)
            wanted = [number for _, own in chunks.by_shard(numbers) for number in own]
            entries = {number: self._ahead.pop((chunks, number)) for number in wanted}
            for number, entry in entries.items():
                self._ahead_bytes -= entry.num_bytes
                self._keep(chunks, number, entry)
        try:
            found = {n: entry.task.future.result()[n] for n, entry in entries.items()}
        except BaseException:
            with self._lock:  # so that it can be tried again
                for number in entries:
                    self._drop(chunks, number)
            raise
        self.transfers.delivered(sum(entry.num_bytes for entry in entries.values()))
        return found

    def _expect(self, chunks: "RemoteChunks", number: int, entry: _Entry) -> None:
        self._ahead[chunks, number] = entry
        self._ahead_bytes += entry.num_bytes

    def _keep(self, chunks: "RemoteChunks", number: int, entry: _Entry) -> None:
        group = chunks.group(number)
        self._kept.setdefault(group, {})[number] = entry
        self._kept.move_to_end(group)
        self._kept_bytes += entry.num_bytes
        while self._kept_bytes > self._max_kept and len(self._kept) > 1:
            oldest, entries = self._kept.popitem(last=False)
            self._kept_bytes -= sum(each.num_bytes for each in entries.values())
            if self.cache is None:  # whoever asks for the shard again gets the rest of it again
                self._begun.pop(oldest, None)

    def _drop(self, chunks: "RemoteChunks", number: int) -> _Entry | None:
        entry = self._kept.get(chunks.group(number), {}).pop(number, None)
        if entry is not None:
            self._kept_bytes -= entry.num_bytes
        return entry


class RemoteChunks:
    """The chunks of one array.

    Args:
        ahead: fetches them.
        client: of the array's folder.
        folder: where the array is.
        identity: of the store, which has another one if it is written again.
        name_of: shard -> path of its file, relative to the array.
        num_chunks: of a shard.
        index_bytes: at the end of the file of a shard.
        make_file: shard and the end of its file -> its index, checked.
        whole: fetch the rest of a shard once its first chunk is requested.
    """

    def __init__(
        self,
        ahead: ReadAhead,
        client: Client,
        folder: str,
        identity: str,
        name_of: Callable[[int], str],
        num_chunks: int,
        index_bytes: int,
        make_file: "Callable[[int, np.ndarray], ShardFile]",
        *,
        whole: bool = False,
    ) -> None:
        self.ahead, self.num_chunks, self.whole = ahead, num_chunks, whole
        self.files: dict[int, ShardFile] = {}
        self._client, self._name_of = client, name_of
        self._folder, self._identity = folder, identity
        self._index_bytes, self._make_file = index_bytes, make_file
        self._ranges: dict[int, list[tuple[int, int] | None]] = {}
        self._versions: dict[int, str] = {}
        self._keys: dict[int, ShardKey] = {}
        self._lock = RLock()

    def open(self, shards: Sequence[int]) -> None:
        """Fetch the indexes of shards that are not there yet, all at once.

        Raises:
            InputError: a shard is not written, or its index is damaged.
        """
        transfers = self.ahead.transfers
        with self._lock:
            new = [shard for shard in shards if shard not in self.files]
            tasks = {
                shard: transfers.submit(partial(self._get, shard, -self._index_bytes, None))
                for shard in new
            }
            for shard, task in tasks.items():
                try:
                    found = task.future.result()
                except FileNotFoundError as error:
                    raise InputError(
                        f"{self._folder}/{self._name_of(shard)} is not written yet; rerun the "
                        "command that makes this store"
                    ) from error
                self._versions[shard] = found.version
                if found.version:
                    parts = (self._folder, self._identity, self._name_of(shard), found.version)
                    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
                    self._keys[shard] = ShardKey(name, self.num_chunks)
                file = self._make_file(shard, found.content)
                self._ranges[shard] = [file.byte_range(n) for n in range(self.num_chunks)]
                self.files[shard] = file

    def request(self, numbers: np.ndarray) -> None:
        """Begin to fetch chunks; errors are those of :meth:`open`."""
        self.open(np.unique(numbers // self.num_chunks).tolist())
        self.ahead.request(self, numbers)

    def take(self, numbers: np.ndarray) -> Parts:
        """:meth:`ReadAhead.take`."""
        self.open(np.unique(numbers // self.num_chunks).tolist())
        return self.ahead.take(self, numbers)

    def group(self, number: int) -> tuple["RemoteChunks", int]:
        """What makes room together with a chunk: its shard where that is fetched whole."""
        return self, number // self.num_chunks if self.whole else number

    def by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Each shard with those of its chunks that are stored."""
        if not len(numbers):
            return
        shards, starts = np.unique(numbers // self.num_chunks, return_index=True)
        for shard, own in zip(shards.tolist(), np.split(numbers, starts[1:]), strict=True):
            ranges, before = self._ranges[shard], shard * self.num_chunks
            yield shard, [number for number in own.tolist() if ranges[number - before]]

    def stored(self, shard: int) -> list[int]:
        """All stored chunks of a shard."""
        before = shard * self.num_chunks
        return [before + number for number, found in enumerate(self._ranges[shard]) if found]

    def size(self, number: int) -> int:
        """Bytes of a stored chunk."""
        start, stop = self._range(number)
        return stop - start

    def _range(self, number: int) -> tuple[int, int]:
        shard, own = divmod(number, self.num_chunks)
        found = self._ranges[shard][own]
        assert found is not None
        return found

    def parts(self, shard: int, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Chunks of a shard in groups, each of which one transfer fetches.

        Chunks 3, 4 and 9, of which 3 and 4 are neighbours in the file::

            file     ... | 3 | 4 | 5 6 7 8 | 9 | ...
            groups       [3, 4]           [9]
        """
        group: list[int] = []
        first = last = 0
        for number in sorted(numbers, key=self._range):
            start, stop = self._range(number)
            if group and (start - last > GAP_BYTES or stop - first > PART_BYTES):
                yield group
                group = []
            if not group:
                first = start
            group.append(number)
            last = stop
        if group:
            yield group

    def fetch(self, shard: int, numbers: Sequence[int]) -> Parts:
        """Some neighbouring chunks, from the cache or from where the store is."""
        cache, counts = self.ahead.cache, self.ahead.counts
        key = self._keys.get(shard)
        if cache is None or key is None:
            return self._fetch(shard, numbers)
        own = {number - shard * self.num_chunks: self._range(number) for number in numbers}
        found: Parts = {}
        for number, content in cache.read(key, own).items():
            if self.files[shard].fits(number, content):
                found[number + shard * self.num_chunks] = content
            elif cache.drop(key, number):
                counts.add(refetched=1)
        counts.add(cached_bytes=sum(map(len, found.values())))
        missing = [number for number in numbers if number not in found]
        if missing:
            self.ahead.missed(self, shard)
            found |= self._fetch_into(cache, key, shard, missing)
        return found

    def fill(self, shard: int, numbers: Sequence[int]) -> None:
        """Fetch those of some chunks that the cache does not hold, into it."""
        cache, key = self.ahead.cache, self._keys.get(shard)
        if cache is not None and key is not None and not cache.fault:
            held = cache.held(key)
            missing = [n for n in numbers if not held[n - shard * self.num_chunks]]
            self._fetch_into(cache, key, shard, missing)

    def _fetch_into(
        self, cache: ChunkCache, key: ShardKey, shard: int, numbers: Sequence[int]
    ) -> Parts:
        fetched: Parts = {}
        for part in self.parts(shard, numbers):
            fetched |= self._fetch(shard, part)
        new = {
            number - shard * self.num_chunks: (self._range(number)[0], content)
            for number, content in fetched.items()
        }
        self.ahead.counts.add(uncached=cache.write(key, new))
        return fetched

    def _fetch(self, shard: int, numbers: Sequence[int]) -> Parts:
        """Neighbouring chunks by one transfer; a second if they were damaged on the way."""
        ranges = {number: self._range(number) for number in numbers}
        first, last = min(ranges.values())[0], max(stop for _, stop in ranges.values())
        file, before = self.files[shard], shard * self.num_chunks

        def cut() -> Parts:
            content = self._get(shard, first, last).content
            return {n: content[start - first : stop - first] for n, (start, stop) in ranges.items()}

        parts = cut()
        if not all(file.fits(number - before, part) for number, part in parts.items()):
            self.ahead.counts.add(retries=1)
            parts = cut()
            for number, part in parts.items():
                file.check_fetched(number - before, part)
        return parts

    def _get(self, shard: int, start: int, stop: int | None) -> Part:
        name, transfers = self._name_of(shard), self.ahead.transfers

        def call() -> Part:
            part = self._client.get(name, start, stop, self._versions.get(shard, ""))
            if stop is not None and len(part.content) != stop - start:
                raise ConnectionError(f"{len(part.content):,} bytes instead of {stop - start:,}")
            return part

        part = transfers.repeat(f"{self._folder}/{name}", call)
        transfers.counts.add(num_bytes=len(part.content))
        return part
