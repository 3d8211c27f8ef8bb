"""A loader that obeys an order: batches of features and latents, read ahead.

The order is arithmetic and the reading is input/output, and they are apart: what a step trains on,
noise included, is a pure function of (seed, position), whoever reads it, in however many parts, and
after however many restarts.

Shapes: B batch (of this rank and accumulation step), R rows (tokens of all captions, packed),
U unique captions, L layers, H text width, C channels.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...pipeline.store.features import FeatureStore
from ...pipeline.store.latents import LatentStore
from ...schemas import DataConfig, InputError
from .batch import Batch, Kind, PaddedBatch
from .buffers import allocate, allocate_codes
from .dataset import StorePair, open_pairs, proportions
from .sampler import SampleIndices, make_sampler
from .throughput import InputStallMonitor


class StreamingDataset(IterableDataset[Kind], ABC):
    """Batches of one rank, read ahead by threads of its own: what both streams share.

    The global batch of a step is ``data.batch_size`` positions, cut into accumulation steps and
    each of these into ranks, so that it holds the same samples however it is cut. Its latents have
    one shape.

    To other trainers it is a dataset of whole batches, endless:
    ``DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="forkserver")``
    gives the same batches in the same order. It is sent to workers without what it has opened.

    Args:
        features, latents: complete stores of the same samples.
        layers: LLM layers to read, in this order (``router.layers_read``).
        held_out: samples of these stores that are never delivered, int64.
        start_step: the first step to deliver.
        pairs: what :func:`open_pairs` found of ``data``, where it is known already.

    Attributes:
        meter: how long the consumer waited, and how much was delivered.

    Raises:
        InputError: stores that are unfinished or of other samples, a selection that does not fit
            them, or a batch that ranks and accumulation steps do not divide.
    """

    def __init__(
        self,
        features: FeatureStore,
        latents: LatentStore,
        data: DataConfig,
        *,
        seed: int,
        layers: Sequence[int],
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        held_out: Sequence[int] | np.ndarray = (),
        start_step: int = 0,
        pairs: Sequence[StorePair] | None = None,
    ) -> None:
        parts = world_size * grad_accum_steps
        if data.batch_size % parts:
            raise InputError(
                f"data.batch_size {data.batch_size} is not a multiple of {parts}: {world_size} "
                f"ranks with {grad_accum_steps} accumulation steps each take an equal part"
            )
        first, *others = open_pairs(features, latents, data) if pairs is None else pairs
        self.pairs = [first.without(held_out), *others]
        self.features = features
        self.latents = latents
        self.data = data
        self.seed = seed
        self.layers = list(layers)
        self.rank = rank
        self.world_size = world_size
        self.grad_accum_steps = grad_accum_steps
        self.start_step = start_step
        self.held_out = held_out
        self.meter = InputStallMonitor(data.workers)
        self.order = make_sampler(self.pairs, data, seed)
        if data.workers > 1:  # threads beside each other instead of in every read
            for pair in self.pairs:
                pair.features.num_threads = max(1, pair.features.num_threads // data.workers)

    _options: tuple[str, ...] = (
        "seed",
        "layers",
        "rank",
        "world_size",
        "grad_accum_steps",
        "held_out",
        "start_step",
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process without what was opened, chosen and read here."""
        options = {name: getattr(self, name) for name in self._options}
        return partial(type(self), **options), (self.features, self.latents, self.data)

    @property
    def num_samples(self) -> int:
        """That are trained on, of all pairs of stores."""
        return sum(len(pair.source) for pair in self.pairs)

    @property
    def wait_seconds(self) -> float:
        """How long the consumer has waited for data so far."""
        return self.meter.wait_seconds

    def first_position(self, step: int, micro_step: int = 0) -> int:
        """Global position where this rank's part of an accumulation step begins."""
        part = self.data.batch_size // (self.world_size * self.grad_accum_steps)
        return step * self.data.batch_size + (micro_step * self.world_size + self.rank) * part

    @abstractmethod
    def read(self, step: int, micro_step: int = 0) -> Kind:
        """One batch, read now.

        By numpy: an operator of torch that runs on several threads would give the thread that reads
        an OpenMP team of its own. There would then be more threads than cores, and libgomp lets
        those that train sleep between loops (its manual, GOMP_SPINCOUNT): twice as slow on a CPU.
        """

    def _due(self, step: int, micro_step: int) -> tuple[int, SampleIndices, Tensor]:
        """First position of a batch, what stands there and on, and its latents [B, C, h, w]."""
        first = self.first_position(step, micro_step)
        num = self.data.batch_size // (self.world_size * self.grad_accum_steps)
        places = self.order.places(first, num)
        some = self.pairs[places.source[0]].latents
        shape = some.shape(int(some.buckets[places.sample[0]]))
        noise = self._posterior_noise(first, num, shape)
        latents = allocate((num, *shape), torch.float32)
        values = latents.numpy()
        for number, pair in enumerate(self.pairs):
            here = np.flatnonzero(places.source == number)
            if len(here):
                part = None if noise is None else noise[here]
                read = pair.latents.read(places.sample[here], part)
                values[here] = read
        return first, places, latents

    def _row_shape(self) -> tuple[int, int]:
        """(L, H)."""
        return len(self.layers), self.features.manifest.identity.model.width

    def captions(self, first: int, num: int) -> list[np.ndarray]:
        """Ids of the captions that positions ``first`` to ``first + num`` show, each once, of every
        pair of stores."""
        places = self.order.places(first, num)
        return [np.unique(places.caption[places.source == n]) for n in range(len(self.pairs))]

    def stored_bytes(self, num_rows: float, num_samples: float) -> float:
        """About what so many rows and samples are in the stores, compressed as they are there."""
        return sum(
            share * (num_rows * pair.row_bytes(self.layers) + num_samples * pair.latent_bytes)
            for share, pair in zip(proportions(self.pairs), self.pairs, strict=True)
        )

    def warning(self) -> str | None:
        """That data comes too late, with the numbers and what to do: once, after a while of it."""
        return self.meter.warning(self.stored_bytes)

    def _posterior_noise(
        self, first: int, num: int, shape: tuple[int, int, int]
    ) -> np.ndarray | None:
        """Standard normal float32 [num, C, height, width] of positions ``first`` and on, where
        latents are draws from a posterior."""
        drawn = any(pair.latents.has_deviation for pair in self.pairs)
        if self.data.posterior == "mean" or not drawn:
            return None
        keys = [(self.seed, 3, position) for position in range(first, first + num)]
        generators = (
            np.random.Generator(np.random.Philox(np.random.SeedSequence(k))) for k in keys
        )
        return np.stack([each.standard_normal(shape, np.float32) for each in generators])

    def __iter__(self) -> Generator[Kind]:
        """Batches without end, in order; closing the iterator stops the reading. In a worker of a
        ``DataLoader`` those that are its turn.

        An error while reading is raised here, at the batch that it concerns.
        """
        ahead: deque[Future[Kind]] = deque()
        reader = ThreadPoolExecutor(self.data.workers, thread_name_prefix="semroute-stream")
        worker = get_worker_info()
        places = self._places()
        if worker is not None:
            places = islice(places, worker.id, None, worker.num_workers)
        depth = max(self.data.prefetch, self.data.workers)
        try:
            ahead.extend(reader.submit(self.read, *next(places)) for _ in range(depth))
            while True:
                began = time.perf_counter()
                batch = ahead.popleft().result()
                waited = time.perf_counter() - began
                # Only now, so that its reading begins beside the step and not beside the wait.
                ahead.append(reader.submit(self.read, *next(places)))
                self.meter.add(waited, batch.num_rows, len(batch.sample_ids))
                yield batch
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _places(self) -> Iterator[tuple[int, int]]:
        step = self.start_step
        while True:
            for micro_step in range(self.grad_accum_steps):
                yield step, micro_step
            step += 1


class PackedLoader(StreamingDataset[Batch]):
    """Batches of packed rows, each unique caption once: what :func:`.loop.train` reads.

    Args:
        codes: deliver codes, which ``Batch.to`` decodes on its device; otherwise the reading thread
            decodes. Codes are more bytes than what they stand for once they are decompressed, so
            it is for codecs that a CPU decodes slowly (``Codec.matrices``).

    Other arguments and errors: as of :class:`StreamingDataset`.
    """

    _options = (*StreamingDataset._options, "codes")

    def __init__(
        self,
        features: FeatureStore,
        latents: LatentStore,
        data: DataConfig,
        *,
        codes: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(features, latents, data, **options)
        self.codes = codes

    def read(self, step: int, micro_step: int = 0) -> Batch:
        """One batch, read now."""
        first, places, latents = self._due(step, micro_step)
        captions = [np.unique(places.caption[places.source == n]) for n in range(len(self.pairs))]
        counts = [
            pair.features.num_rows(ids) for pair, ids in zip(self.pairs, captions, strict=True)
        ]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        caption = np.empty(len(places.caption), np.int64)
        hidden = None
        if not self.codes:
            hidden = allocate((int(offsets[-1]), *self._row_shape()), torch.bfloat16)
        codes, before = [], 0
        for number, (pair, ids) in enumerate(zip(self.pairs, captions, strict=True)):
            if not len(ids):
                continue
            here = places.source == number
            caption[here] = before + np.searchsorted(ids, places.caption[here])
            if hidden is None:
                codes.append(pair.features.read_codes(ids, self.layers, empty=allocate_codes))
            else:
                rows = hidden.view(torch.uint16).numpy()
                pair.features.read(ids, self.layers, out=rows[offsets[before] :])
            before += len(ids)
        return Batch(
            step=step,
            micro_step=micro_step,
            position=first,
            sample_ids=places.sample,
            hidden=tuple(codes) if hidden is None else hidden,
            offsets=torch.from_numpy(offsets),
            caption=torch.from_numpy(caption),
            latents=latents,
            sources=places.source if len(self.pairs) > 1 else None,
        )


class PaddedLoader(StreamingDataset[PaddedBatch]):
    """Padded batches, for networks that read text so. Rows are read, and decoded, straight to
    where they belong: a caption that two samples of a batch share is read twice.

    Arguments and errors: as of :class:`StreamingDataset`.
    """

    def read(self, step: int, micro_step: int = 0) -> PaddedBatch:
        """One batch, read now."""
        first, places, latents = self._due(step, micro_step)
        num = len(places.caption)
        counts = np.empty(num, np.int64)
        for number, pair in enumerate(self.pairs):
            here = places.source == number
            counts[here] = pair.features.num_rows(places.caption[here])
        longest = int(counts.max())
        hidden = allocate((num, longest, *self._row_shape()), torch.bfloat16)
        rows = hidden.view(torch.uint16).numpy()
        for number, pair in enumerate(self.pairs):
            here = np.flatnonzero(places.source == number)
            if len(here):
                pair.features.read_padded(places.caption[here], self.layers, rows, here)
        return PaddedBatch(
            step=step,
            micro_step=micro_step,
            position=first,
            sample_ids=places.sample,
            hidden=hidden,
            mask=torch.from_numpy(np.arange(longest) < counts[:, None]),
            latents=latents,
            sources=places.source if len(self.pairs) > 1 else None,
        )
