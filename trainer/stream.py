"""A loader that obeys an order: batches of features and latents, read ahead.

The order is arithmetic and the reading is input/output, and they are apart: what a step trains on,
noise included, is a pure function of (seed, position), whoever reads it, in however many parts, and
after however many restarts.

Shapes: B batch (of this rank and accumulation step), R rows (tokens of all captions, packed),
U unique captions, L layers, H text width, C channels.
"""

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..pipeline.store import Codes, FeatureStore, LatentStore, Rows
from ..schemas import DataConfig, InputError
from .flow import Flow
from .order import Order, Source


def draw(
    flow: Flow, shape: tuple[int, ...], *, seed: int, first: int, num: int, draws: int
) -> tuple[Tensor, Tensor]:
    """t [num * draws] and noise [num * draws, *shape] of global positions ``first`` and on.

    Each position has a generator of its own, seeded by (seed, position), so that neither ranks nor
    accumulation steps nor devices nor restarts change what a sample is trained with. On the CPU.
    """
    t, noise = [], []
    for position in range(first, first + num):
        state = np.random.SeedSequence((seed, 2, position)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        t.append(flow.sample_t(draws, generator))
        noise.append(torch.randn(draws, *shape, generator=generator))
    return torch.cat(t), torch.cat(noise)


def jitter(t: Tensor, deviation: float, *, seed: int, first: int, draws: int) -> Tensor:
    """The t that gates are told in training: t [num * draws], with noise, in [0, 1].

    A function of seed and position as :func:`draw`, whose numbers it leaves alone.
    """
    noise = []
    for position in range(first, first + len(t) // draws):
        key = np.random.SeedSequence((seed, 4, position))
        noise.append(np.random.Generator(np.random.Philox(key)).standard_normal(draws, np.float32))
    return (t + deviation * torch.from_numpy(np.concatenate(noise))).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one accumulation step.

    Attributes:
        step, micro_step: which.
        position: global position of the first sample; the others follow.
        sample_ids: int64 [B].
        hidden: bfloat16 [R, L, H], rows of U unique captions, each read once; or their codes.
        offsets: int64 [U + 1], on the CPU.
        caption: int64 [B], index of each sample's caption among the unique ones, on the CPU.
        latents: fp32 [B, C, height, width].
    """

    step: int
    micro_step: int
    position: int
    sample_ids: np.ndarray
    hidden: Tensor | Codes
    offsets: Tensor
    caption: Tensor
    latents: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same with the large tensors on a device, where codes are decoded."""
        hidden = self.hidden
        moved = hidden.tensor(device) if isinstance(hidden, Codes) else hidden.to(device)
        return replace(self, hidden=moved, latents=self.latents.to(device))


class Stream:
    """Batches of one rank, read ahead by a thread of its own.

    The global batch of a step is ``data.batch_size`` positions, cut into accumulation steps and
    each of these into ranks, so that it holds the same samples however it is cut.

    Args:
        features, latents: complete stores of the same samples.
        layers: LLM layers to read, in this order (``router.layers_read``).
        held_out: samples that are never delivered, int64.
        start_step: the first step to deliver.
        codes: deliver codes, which ``Batch.to`` decodes on its device; otherwise the reading thread
            decodes. Fewer bytes are moved, and a GPU decodes faster than a CPU.

    Attributes:
        wait_seconds: how long the consumer waited for data so far.

    Raises:
        InputError: stores that are unfinished or of other samples, or a batch that ranks and
            accumulation steps do not divide.
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
        codes: bool = False,
    ) -> None:
        check_joined(features, latents)
        parts = world_size * grad_accum_steps
        if data.batch_size % parts:
            raise InputError(
                f"data.batch_size {data.batch_size} is not a multiple of {parts}: {world_size} "
                f"ranks with {grad_accum_steps} accumulation steps each take an equal part"
            )
        self.features = features
        self.latents = latents
        self.data = data
        self.layers = list(layers)
        self.rank = rank
        self.world_size = world_size
        self.grad_accum_steps = grad_accum_steps
        self.start_step = start_step
        self.codes = codes
        self.wait_seconds = 0.0
        self.order = Order(
            [source_of(features, latents, held_out)],
            seed=seed,
            caption_dropout=data.caption_dropout,
        )

    def first_position(self, step: int, micro_step: int = 0) -> int:
        """Global position where this rank's part of an accumulation step begins."""
        part = self.data.batch_size // (self.world_size * self.grad_accum_steps)
        return step * self.data.batch_size + (micro_step * self.world_size + self.rank) * part

    def read(self, step: int, micro_step: int = 0) -> Batch:
        """One batch, read now."""
        first = self.first_position(step, micro_step)
        num = self.data.batch_size // (self.world_size * self.grad_accum_steps)
        places = self.order.places(first, num)
        samples = places.sample
        unique, caption = np.unique(places.caption, return_inverse=True)
        rows: Rows | Codes
        if self.codes:
            rows = self.features.read_codes(unique, self.layers)
        else:
            rows = self.features.read(unique, self.layers)
        return Batch(
            step=step,
            micro_step=micro_step,
            position=first,
            sample_ids=samples,
            hidden=rows if isinstance(rows, Codes) else rows.tensor(),
            offsets=torch.from_numpy(rows.offsets),
            caption=torch.from_numpy(caption),
            latents=torch.from_numpy(self.latents.read(samples, self._posterior_noise(first, num))),
        )

    def captions(self, first: int, num: int) -> np.ndarray:
        """Ids of the captions that positions ``first`` to ``first + num`` show, each once."""
        return np.unique(self.order.places(first, num).caption)

    def _posterior_noise(self, first: int, num: int) -> np.ndarray | None:
        """Standard normal float32 [num, C, height, width] of positions ``first`` and on, where
        latents are draws from a posterior."""
        if self.data.posterior == "mean" or not self.latents.has_deviation:
            return None
        shape = self.latents.manifest.identity.shape
        keys = [(self.order.seed, 3, position) for position in range(first, first + num)]
        generators = (
            np.random.Generator(np.random.Philox(np.random.SeedSequence(k))) for k in keys
        )
        return np.stack([each.standard_normal(shape, np.float32) for each in generators])

    def __iter__(self) -> Generator[Batch]:
        """Batches without end, in order; closing the iterator stops the reading.

        An error while reading is raised here, at the batch that it concerns.
        """
        ahead: deque[Future[Batch]] = deque()
        reader = ThreadPoolExecutor(1, thread_name_prefix="semroute-stream")
        places = self._places()
        try:
            while True:
                while len(ahead) < self.data.prefetch:
                    ahead.append(reader.submit(self.read, *next(places)))
                began = time.perf_counter()
                batch = ahead.popleft().result()
                self.wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _places(self) -> Iterator[tuple[int, int]]:
        step = self.start_step
        while True:
            for micro_step in range(self.grad_accum_steps):
                yield step, micro_step
            step += 1


def source_of(
    features: FeatureStore, latents: LatentStore, held_out: Sequence[int] | np.ndarray = ()
) -> Source:
    """Samples that have a latent and are not held out, and their captions."""
    ids = np.setdiff1d(latents.ids, held_out, assume_unique=True)
    lists = features.samples["caption_ids"].combine_chunks().take(pa.array(ids))
    shards = features.captions["shard"].to_numpy().astype(np.int64)
    captions = lists.values.to_numpy()
    return Source(ids, lists.offsets.to_numpy().astype(np.int64), captions, shards=shards[captions])


def check_joined(features: FeatureStore, latents: LatentStore) -> None:
    """Refuse stores that cannot be trained on together.

    Raises:
        InputError: one is unfinished, or they were not made from the same samples.
    """
    if latents.manifest.identity.buckets:
        raise InputError(
            f"{latents.path} holds latents of {len(latents.bucket_counts())} shapes (--buckets), "
            "but training takes latents of one shape: make them with --size alone"
        )
    for store in (features, latents):
        if not store.is_complete:
            raise InputError(
                f"{store.path} is not finished: {len(store.remaining())} of "
                f"{store.manifest.layout.num_shards} shards remain. Run the command that made it "
                "once more: it continues where it stopped."
            )
    text, images = features.manifest.identity.samples, latents.manifest.identity.samples
    if text.num_samples != images.num_samples:
        raise InputError(
            f"{features.path} has {text.num_samples} samples but {latents.path} has "
            f"{images.num_samples}: make both from the same file"
        )
    if images.fingerprint is not None and text.fingerprint != images.fingerprint:
        raise InputError(
            f"{features.path} and {latents.path} were made from other captions or another order "
            f"of samples (fingerprints {text.fingerprint} and {images.fingerprint}): make both "
            "from the same file"
        )
