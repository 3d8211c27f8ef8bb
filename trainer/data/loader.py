"""Loaders that follow a sampler: batches of features and latents, read ahead.

The sampler is arithmetic and the loader is input and output. What a step trains on, noise included,
is a pure function of (seed, position), whoever reads it, in however many parts, and after however
many restarts.

    StreamingDataset   base: positions of a rank, latents, reading ahead by threads
    PackedLoader       Batch: rows of unique captions, each read once; what training uses
    PaddedLoader       PaddedBatch: one padded caption per sample; for other trainers

Shapes: B batch (of one rank and accumulation step), R rows (tokens of all captions, packed),
U unique captions, T tokens of the longest caption, L layers, H text width, C channels.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...pipeline.store.order.dataset import StorePair, open_pairs, proportions
from ...pipeline.store.order.sampler import WHOLE_BATCH, BatchPartition, SampleIndices, make_sampler
from ...pipeline.store.remote.chunks import ReadAhead
from ...schemas import NULL, DataConfig, FetchCounts, InputError
from ...schemas.seeds import RANDOM_VERSION, Purpose, numpy_generator
from ..diffusion.noise import NoiseSource
from .batch import ON_CPU, Batch, PaddedBatch
from .buffers import allocate, allocate_codes, allocated
from .remote import check_cache, fetch_stores
from .throughput import InputStallMonitor

if TYPE_CHECKING:
    from ...pipeline.store.budget.followed import FollowedFeatureStore
    from ...pipeline.store.features import FeatureStore
    from ...pipeline.store.latents import LatentStore

_MAX_REQUESTED = 256
"""Batches that are requested and not begun, however small they are."""
AnyBatch = TypeVar("AnyBatch", bound=Batch | PaddedBatch)


class StreamingDataset(IterableDataset[AnyBatch], ABC):
    """Batches of one rank, read ahead by threads of its own: what both loaders share.

    A global batch is ``data.batch_size`` positions, of which this rank reads its part. Its latents
    have one shape.

    For other trainers it is an endless dataset of whole batches:
    ``DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="forkserver")``
    gives the same batches in the same order. Workers receive its arguments and open the rest
    themselves.

    Args:
        features, latents: complete stores of the same samples.
        layers: LLM layers to read, in this order (``router.layers_read``).
        partition: part of every global batch that is read; by default all of it.
        held_out: samples of these stores that are never delivered, int64.
        start_step: the first step to deliver.
        pairs: result of :func:`open_pairs` for ``data``, where it is known already.
        version: of the order, ``TrainConfig.random_version``.

    Attributes:
        stall_monitor: how long the consumer waited, and how much was delivered.
        stop: once it is set, reading no longer waits for shards of a store with a disk budget.

    Raises:
        InputError: stores that are unfinished or of different samples, a selection that does not
            fit them, or a batch that ranks and accumulation steps do not divide.
    """

    def __init__(
        self,
        features: "FeatureStore",
        latents: "LatentStore",
        data: DataConfig,
        *,
        seed: int,
        layers: Sequence[int],
        partition: BatchPartition = WHOLE_BATCH,
        held_out: Sequence[int] | np.ndarray = (),
        start_step: int = 0,
        pairs: Sequence[StorePair] | None = None,
        version: int = RANDOM_VERSION,
    ) -> None:
        self.num_positions = partition.size(data.batch_size)
        first, *others = open_pairs(features, latents, data) if pairs is None else pairs
        self.pairs = [first.without(held_out), *others]
        for pair in self.pairs:
            for store in (pair.features, pair.latents, pair.conditioning):
                if store is not None:
                    store.watch()
        check_cache(data)
        self.features = features
        self.latents = latents
        self.data = data
        self.seed = seed
        self.layers = list(layers)
        self.partition = partition
        self.start_step = start_step
        self.held_out = held_out
        self.stall_monitor = InputStallMonitor(data.workers)
        self.stop = threading.Event()
        self.version = version
        self._warned_of_cache = False
        self.sampler = make_sampler(self.pairs, data, seed, version)
        if data.workers > 1:  # threads side by side instead of in every read
            for pair in self.pairs:
                pair.features.num_threads = max(1, pair.features.num_threads // data.workers)

    _options: tuple[str, ...] = ("seed", "layers", "partition", "held_out", "start_step", "version")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what was opened, chosen and read in this process."""
        options = {name: getattr(self, name) for name in self._options}
        return partial(type(self), **options), (self.features, self.latents, self.data)

    @cached_property
    def read_ahead(self) -> ReadAhead | None:
        """Fetches chunks of stores that are not mapped: behind URLs, in file systems of programs
        (FUSE), and all by way of a cache; None if all are mapped."""
        return fetch_stores(self.pairs, self.data)

    @property
    def num_samples(self) -> int:
        """Number of training samples over all pairs of stores."""
        return sum(len(pair.index) for pair in self.pairs)

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer has waited for data so far."""
        return self.stall_monitor.wait_seconds

    def fetched(self) -> FetchCounts | None:
        """What was fetched so far; None if nothing is."""
        if self.read_ahead is None:
            return None
        counts = self.read_ahead.counts
        return FetchCounts(
            fetched_bytes=counts.num_bytes,
            fetch_requests=counts.requests,
            fetch_retries=counts.retries,
            cached_bytes=counts.cached_bytes,
            cache_faults=counts.refetched + counts.uncached,
        )

    @abstractmethod
    def read(self, step: int, micro_step: int = 0) -> AnyBatch:
        """One batch, read now.

        By numpy: an operator of torch that runs on several threads would give the thread that reads
        an OpenMP team of its own. There would then be more threads than cores, and libgomp lets
        those that train sleep between loops (its manual, GOMP_SPINCOUNT): twice as slow on a CPU.
        """

    def _read_latents(self, step: int, micro_step: int) -> tuple[int, SampleIndices, Tensor]:
        """First position of a batch, its samples and captions, and its latents [B, C, h, w]."""
        first = self.partition.first_position(self.data.batch_size, step, micro_step)
        indices = self.sampler.indices(first, self.num_positions)
        # All latents of a batch have one shape: that of its first sample's bucket.
        store = self.pairs[indices.source[0]].latents
        shape = store.shape(int(store.buckets[indices.sample[0]]))
        noise = self._posterior_noise(first, self.num_positions, shape)
        latents = allocate((self.num_positions, *shape), torch.float32)
        self._request(indices)
        values = latents.numpy()
        for number, pair in enumerate(self.pairs):
            own = np.flatnonzero(indices.source == number)
            if len(own):
                part = None if noise is None else noise[own]
                values[own] = pair.latents.read(indices.sample[own], part)
        return first, indices, latents

    def request(self, step: int, micro_step: int = 0) -> None:
        """Ask the disk for what :meth:`read` will read, and do not wait for it.

        Errors are left to :meth:`read`, which meets them again.
        """
        first = self.partition.first_position(self.data.batch_size, step, micro_step)
        with suppress(InputError, OSError):
            self._request(self.sampler.indices(first, self.num_positions))

    def _request(self, indices: SampleIndices) -> None:
        _ = self.read_ahead
        unique = self._unique_captions(indices)
        for number, (pair, captions) in enumerate(zip(self.pairs, unique, strict=True)):
            if len(captions):
                samples = indices.sample[indices.source == number]
                pair.features.request(captions, self.layers)
                pair.latents.request(samples, deviation=self._samples_posterior)
                if pair.conditioning is not None:
                    pair.conditioning.request(captions)

    @property
    def _samples_posterior(self) -> bool:
        """Whether latents are sampled from the posterior of the VAE."""
        has_posterior = any(pair.latents.has_deviation for pair in self.pairs)
        return self.data.posterior != "mean" and has_posterior

    def _row_shape(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.layers), self.features.manifest.identity.model.width

    def captions(self, first: int, num: int) -> list[np.ndarray]:
        """Ids of the captions that positions ``first`` to ``first + num`` show, per pair of stores:
        ascending, each once."""
        return self._unique_captions(self.sampler.indices(first, num))

    def _unique_captions(self, indices: SampleIndices) -> list[np.ndarray]:
        numbers = range(len(self.pairs))
        return [np.unique(indices.caption[indices.source == number]) for number in numbers]

    def stored_bytes(self, num_rows: float, num_samples: float) -> float:
        """Approximate size in the stores of so many rows and samples, compressed as they are."""
        return sum(
            share * (num_rows * pair.row_bytes(self.layers) + num_samples * pair.latent_bytes)
            for share, pair in zip(proportions(self.pairs), self.pairs, strict=True)
        )

    def warning(self) -> str | None:
        """A one-time warning when training waits for data, with the numbers and what to do."""
        cache = None if self.read_ahead is None else self.read_ahead.cache
        if cache is not None and cache.fault and not self._warned_of_cache:
            self._warned_of_cache = True
            return cache.fault
        text = self.stall_monitor.warning(self.stored_bytes)
        budgets = [pair.features for pair in self.pairs if pair.features.has_budget]
        if text is not None and budgets:
            text += f" If it waits for extraction, semroute status {budgets[0].path} says so."
        return text

    def _posterior_noise(
        self, first: int, num: int, shape: tuple[int, int, int]
    ) -> np.ndarray | None:
        """Standard normal float32 [num, C, height, width] of ``num`` positions from ``first`` on,
        where latents are sampled from a posterior."""
        if not self._samples_posterior:
            return None
        positions = range(first, first + num)
        generators = (numpy_generator(self.seed, Purpose.POSTERIOR, p) for p in positions)
        return np.stack([each.standard_normal(shape, np.float32) for each in generators])

    def __iter__(self) -> Generator[AnyBatch]:
        """Batches without end, in order; closing the iterator stops the reading. In a worker of a
        ``DataLoader``, every so many-th batch. The first is read at once, not when it is asked for.

        An error while reading is raised at the batch that it concerns.
        """
        batches = self._read_ahead()
        next(batches)  # starts the threads, and gives no batch
        return cast("Generator[AnyBatch]", batches)

    def _read_ahead(self) -> Generator[AnyBatch | None]:
        """None once the first batch is being read, and then batches without end."""
        ahead: deque[Future[AnyBatch]] = deque()
        reader = ThreadPoolExecutor(self.data.workers, thread_name_prefix="semroute-stream")
        # Requests wait for nobody, so the disk works on all batches ahead, and not on as many as
        # there are threads to read them.
        requester = ThreadPoolExecutor(1, thread_name_prefix="semroute-request")
        steps, requested = self._own_steps(), self._own_steps()
        num_begun = num_requested = 0
        depth = max(self.data.prefetch, self.data.workers)

        closed = threading.Event()
        _ = self.read_ahead  # before there are threads

        def request(num: int) -> None:
            nonlocal num_requested
            while num_requested < num or self._is_hungry(num_requested - num):
                if closed.is_set():
                    return
                self.request(*next(requested))
                num_requested += 1

        def begin(num: int) -> None:
            nonlocal num_begun
            num_begun += num
            requester.submit(request, num_begun)
            for step in islice(steps, num):
                ahead.append(reader.submit(self.read, *step))

        self._end_waits_by(closed)
        try:
            begin(1)  # alone, as everyone waits for it
            yield None
            while True:
                began = time.perf_counter()
                batch = ahead.popleft().result()
                waited = time.perf_counter() - began
                # Only now, so that they are read during the step and not during the wait.
                begin(depth - len(ahead))
                self.stall_monitor.add(waited, batch.num_rows, len(batch.sample_ids))
                yield batch
        finally:
            closed.set()
            for pool in (requester, reader):
                pool.shutdown(wait=True, cancel_futures=True)
            self._end_waits_by()

    def _is_hungry(self, num_ahead: int) -> bool:
        """Whether to request another batch, beyond so many that are not begun: ahead by time."""
        fetched = self.read_ahead is not None and num_ahead < _MAX_REQUESTED
        return fetched and cast(ReadAhead, self.read_ahead).hungry()

    def _own_steps(self) -> Iterator[tuple[int, int]]:
        """The steps of this process: in a worker of a ``DataLoader``, every so many-th."""
        worker = get_worker_info()
        if worker is None:
            return self._steps()
        return islice(self._steps(), worker.id, None, worker.num_workers)

    def _end_waits_by(self, *events: threading.Event) -> None:
        """End waits for shards of stores with a disk budget once :attr:`stop` or one of the events
        is set."""
        for pair in self.pairs:
            if pair.features.has_budget:
                cast("FollowedFeatureStore", pair.features).stops = [self.stop, *events]

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Every step with its accumulation steps, without end."""
        step = self.start_step
        while True:
            for micro_step in range(self.partition.grad_accum_steps):
                yield step, micro_step
            step += 1


class PackedLoader(StreamingDataset[Batch]):
    """Batches of packed rows, each unique caption once: what
    :func:`~semroute.trainer.training.train.train` reads.

    Args:
        codes: deliver codes, which ``Batch.to`` decodes on its device; otherwise the reading thread
            decodes. Decompressed codes are larger than what they stand for, so it is for codecs
            that a CPU decodes slowly (``Codec.matrices``).
        noise: draws t and noise for each batch; None: batches have none.
        marks_null: say which captions are the null caption, for ``Router.needs_positions``.

    Other arguments and errors: as for :class:`StreamingDataset`.
    """

    _options = (*StreamingDataset._options, "codes", "noise", "marks_null")

    def __init__(
        self,
        features: "FeatureStore",
        latents: "LatentStore",
        data: DataConfig,
        *,
        codes: bool = False,
        noise: NoiseSource | None = None,
        marks_null: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(features, latents, data, **options)
        self.codes = codes
        self.noise = noise
        self.marks_null = marks_null

    def read(self, step: int, micro_step: int = 0) -> Batch:
        """One batch, read now."""
        # Four samples from two pairs of stores, each with its unique captions:
        #
        #     source       0   1   0   0
        #     caption id  40  12  17  40
        #     unique      [17, 40] of pair 0, [12] of pair 1; of 3, 5 and 4 rows
        #     offsets      0   3   8  12
        #     caption      1   2   0   1       index among all unique ones, pair after pair
        first, indices, latents = self._read_latents(step, micro_step)
        unique = self._unique_captions(indices)
        counts = [pair.features.num_rows(ids) for pair, ids in zip(self.pairs, unique, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        caption = np.empty(len(indices.caption), np.int64)
        hidden = None
        if not self.codes:
            hidden = allocate((int(offsets[-1]), *self._row_shape()), torch.bfloat16)
        codes, given, before = [], [], 0
        for number, (pair, ids) in enumerate(zip(self.pairs, unique, strict=True)):
            if not len(ids):
                continue
            own = indices.source == number
            caption[own] = before + np.searchsorted(ids, indices.caption[own])
            if hidden is None:
                codes.append(pair.features.read_codes(ids, self.layers, empty=allocate_codes))
            else:
                rows = hidden.view(torch.uint16).numpy()
                pair.features.read(ids, self.layers, out=rows[offsets[before] :])
            if pair.conditioning is not None:
                given.append(pair.conditioning.tensors(ids))
            elif self.marks_null:
                from ...pipeline.store.features import NULL_CAPTION

                given.append({NULL: torch.from_numpy(ids == NULL_CAPTION)})
            before += len(ids)
        draws = None
        if self.noise is not None:
            draws = self.noise.draw(first, len(latents), tuple(latents.shape[1:]), allocate)
        return Batch(
            step=step,
            micro_step=micro_step,
            position=first,
            sample_ids=indices.sample,
            hidden=tuple(codes) if hidden is None else hidden,
            offsets=torch.from_numpy(offsets),
            caption=torch.from_numpy(caption),
            latents=latents,
            sources=indices.source if len(self.pairs) > 1 else None,
            conditioning=join(given),
            draws=draws,
        )


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Tensors of several stores, one after the other, by name, in memory of :func:`.allocate`; None
    of none."""
    if not parts:
        return None
    joined = {
        name: parts[0][name] if len(parts) == 1 else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }
    return {name: value if name in ON_CPU else allocated(value) for name, value in joined.items()}


class PaddedLoader(StreamingDataset[PaddedBatch]):
    """Padded batches, for networks that read text that way. Rows are read and decoded directly into
    place, so a caption that two samples of a batch share is read twice.

    Arguments and errors: as for :class:`StreamingDataset`.
    """

    def read(self, step: int, micro_step: int = 0) -> PaddedBatch:
        """One batch, read now."""
        first, indices, latents = self._read_latents(step, micro_step)
        num = len(indices.caption)
        counts = np.empty(num, np.int64)
        for number, pair in enumerate(self.pairs):
            own = indices.source == number
            counts[own] = pair.features.num_rows(indices.caption[own])
        longest = int(counts.max())
        hidden = allocate((num, longest, *self._row_shape()), torch.bfloat16)
        rows = hidden.view(torch.uint16).numpy()
        for number, pair in enumerate(self.pairs):
            own = np.flatnonzero(indices.source == number)
            if len(own):
                pair.features.read_padded(indices.caption[own], self.layers, rows, own)
        return PaddedBatch(
            step=step,
            micro_step=micro_step,
            position=first,
            sample_ids=indices.sample,
            hidden=hidden,
            mask=torch.from_numpy(np.arange(longest) < counts[:, None]),
            latents=latents,
            sources=indices.source if len(self.pairs) > 1 else None,
        )
