"""The order of samples and captions: arithmetic, without reading anything.

The sample and caption at a position are a pure function of (seed, position), however the positions
are divided, whoever reads them, and after however many restarts.

    MixtureSampler   any samples together; several sources in fixed proportions
    BucketSampler    latents of several shapes: a MixtureSampler per shape, one shape per batch

Shapes: P positions, N samples, M captions of all samples, S sources.
"""

import heapq
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ....schemas import DataConfig, InputError
from ....schemas.seeds import RANDOM_VERSION, Purpose, as_uniform, numpy_generator, philox
from .dataset import SampleIndex, StorePair, by_shape, proportions, shares_of

BLOCK = 1024
"""Turns within which every source has its share, to a turn or two."""
ROUNDING = 1e-12
"""A share that may be 0 but for rounding."""


@dataclass(frozen=True)
class BatchPartition:
    """The part of every global batch that one process reads.

    A batch is cut into accumulation steps and each of these into ranks: it holds the same samples
    however it is cut. Of 12 positions, for 2 ranks with 3 accumulation steps each::

        position     0  1 | 2  3 | 4  5 | 6  7 | 8  9 | 10 11
        micro step      0 |    0 |    1 |    1 |    2 |     2
        rank            0 |    1 |    0 |    1 |    0 |     1
    """

    rank: int = 0
    world_size: int = 1
    grad_accum_steps: int = 1

    @property
    def num_parts(self) -> int:
        """Parts of a global batch."""
        return self.world_size * self.grad_accum_steps

    def size(self, batch_size: int) -> int:
        """Positions of one part.

        Raises:
            InputError: ranks and accumulation steps do not divide the batch.
        """
        if batch_size % self.num_parts:
            raise InputError(
                f"data.batch_size {batch_size} is not a multiple of {self.num_parts}: "
                f"{self.world_size} ranks with {self.grad_accum_steps} accumulation steps each "
                "take an equal part"
            )
        return batch_size // self.num_parts

    def first_position(self, batch_size: int, step: int, micro_step: int) -> int:
        """Global position where this rank's part of an accumulation step begins."""
        part = micro_step * self.world_size + self.rank
        return step * batch_size + part * self.size(batch_size)


WHOLE_BATCH = BatchPartition()
"""The partition of a single process without accumulation."""


@dataclass(frozen=True)
class SampleIndices:
    """Samples and captions at positions, int64 ``[P]`` each.

    Attributes:
        source: number of the pair of stores.
        sample: id in those stores.
        caption: id in those stores; the null caption's where the caption is dropped.
    """

    source: np.ndarray
    sample: np.ndarray
    caption: np.ndarray


Tree = "int | tuple[Tree, Tree, float]"
"""A source, or sources divided in two: the part with more, that with less, and its share."""


def divide(shares: Sequence[float]) -> Any:
    """Sources as a binary :data:`Tree` in which large shares are near the root (Huffman's), so that
    they are rounded few times."""
    heap: list[tuple[float, int, Any]] = [(share, n, n) for n, share in enumerate(shares)]
    heapq.heapify(heap)
    for number in range(len(shares), 2 * len(shares) - 1):
        (less, _, smaller), (more, _, larger) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (less + more, number, (larger, smaller, less / (less + more))))
    return heap[0][2]


class Interleave:
    """Turns given to several sources in fixed proportions, in an order that is a function of
    (key, turn).

    Args:
        shares: of each source, all above 0; their sum is 1.
        seed, purpose, part: key of the generators, to which the number of a block is added.
        version: 2: sources are divided in two, and their turns between both, until each is alone.
            1: the first takes what rounding down leaves, which may be nothing.
    """

    def __init__(
        self,
        shares: Sequence[float],
        seed: int,
        purpose: Purpose,
        *part: int,
        version: int = RANDOM_VERSION,
    ) -> None:
        self.shares = list(shares)
        self._seed, self._purpose, self._part = seed, purpose, part
        self._version = version
        self._tree = divide(self.shares)

    def turns(self, first: int, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is from ``first`` to ``first + num``, and how many turns that source had
        before: int64 ``[num]`` each.

        In every block of :data:`BLOCK` turns sources have their shares, rounded so that nothing is
        lost over all blocks: whatever the shares and their number, no source ever has fewer turns
        after a block than before.
        """
        if len(self.shares) == 1:
            return np.zeros(num, np.int64), np.arange(first, first + num)
        blocks = range(first // BLOCK, -(-(first + num) // BLOCK))
        sources, turns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block in blocks:
            source, turn = self._block(block)
            sources.append(source)
            turns.append(turn)
        start = first - blocks.start * BLOCK
        wanted = slice(start, start + num)
        return np.concatenate(sources)[wanted], np.concatenate(turns)[wanted]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`turns` of one block: int64 ``[BLOCK]`` each."""
        # With 8 turns per block, 5 for source 0, which had 10 before, and 3 for source 1 after 6:
        #
        #     source       0  0  0  0  0  1  1  1     in order
        #     turn        10 11 12 13 14  6  7  8     how many that source had before
        #     shuffled     1  0  1  0  0  1  0  0     sources in random order
        #     position     1  3  4  6  7  0  2  5     of source 0's turns, then of source 1's
        #     turns        6 10  7 11 12  8 13 14     turns[position] = turn: ascending per source
        before = self._turns_before(block)
        counts = self._turns_before(block + 1) - before
        if counts.min() < 0:
            raise InputError(
                f"random_version 1 cannot divide turns among {len(counts)} sources of nearly equal "
                "shares: set random_version=2"
            )
        source = np.repeat(np.arange(len(counts)), counts)
        turn = np.arange(BLOCK) + np.repeat(before - (np.cumsum(counts) - counts), counts)
        generator = numpy_generator(self._seed, self._purpose, *self._part, block)
        shuffled = source[generator.permutation(BLOCK)]
        position = np.argsort(shuffled, kind="stable")
        turns = np.empty(BLOCK, np.int64)
        turns[position] = turn
        return shuffled, turns

    def _turns_before(self, block: int) -> np.ndarray:
        """Turns that each source had before a block: int64 ``[S]``."""
        before = block * BLOCK
        if self._version == 1:
            others = [int(before * share) for share in self.shares[1:]]
            return np.array([before - sum(others), *others], np.int64)
        # Of two, one has floor(n share) of n turns and the other the rest. Both grow with n, so
        # what is divided further grows too:
        #
        #     shares 0.5, 0.3, 0.2      n = 9:  9 = 5 + 4, and 4 = 3 + 1
        turns, divided = np.empty(len(self.shares), np.int64), [(self._tree, before)]
        while divided:
            node, num = divided.pop()
            if isinstance(node, int):
                turns[node] = num
            else:
                larger, smaller, share = node
                of_smaller = int(num * share)
                divided += [(larger, num - of_smaller), (smaller, of_smaller)]
        return turns


class MixtureSampler:
    """Samples and captions by position, from one source or several in proportions.

    Positions are interleaved between sources. Each source divides its own turns into epochs: epoch
    e of N samples is turns e * N to (e + 1) * N, and holds every sample once.

    Args:
        sources: at least one, none of them empty.
        caption_dropout: share of positions that train the null caption.
        proportions: share of positions of every source but the first, which has the rest.
        window: None: any sample may follow any other. Otherwise samples come shard by shard, and
            each shard's samples are spread over this many shards: see :class:`EpochShuffle`.
        part: number of this sampler, where it is one of several.
        version: see :class:`Interleave`.

    Raises:
        InputError: proportions leave nothing for the first source.
    """

    def __init__(
        self,
        sources: Sequence[SampleIndex],
        *,
        seed: int,
        caption_dropout: float,
        proportions: Sequence[float] = (),
        window: int | None = None,
        part: int = 0,
        version: int = RANDOM_VERSION,
    ) -> None:
        self.sources = list(sources)
        self.caption_dropout = caption_dropout
        self.proportions = [1.0 - sum(proportions), *proportions]
        parts = (0, part) if part else ()  # keys of the first sampler are those of a single one
        self._seed, self._parts = seed, parts
        if self.proportions[0] <= ROUNDING:
            raise InputError(
                f"the proportions of a mixture, {', '.join(map(str, proportions))}, leave nothing "
                "for the first source; give them less than 1 in all"
            )
        self.interleave = Interleave(
            self.proportions, seed, Purpose.MIXTURE, *parts, version=version
        )
        self.epochs = [
            EpochShuffle(
                source, seed, (number, part) if part else (number,) if number else (), window
            )
            for number, source in enumerate(sources)
        ]

    def indices(self, first: int, num: int) -> SampleIndices:
        """Samples and captions at positions ``first`` to ``first + num``.

        Philox counts in blocks of four words, one block per position: the first word decides
        dropout, the second the caption.
        """
        from ..features import NULL_CAPTION

        bits = philox(self._seed, Purpose.CHOICE, *self._parts).advance(first)
        words = bits.random_raw(4 * num).reshape(-1, 4)
        source, turn = self.interleave.turns(first, num)
        sample, caption = np.empty(num, np.int64), np.empty(num, np.int64)
        for number, epochs in enumerate(self.epochs):
            own = source == number
            sample[own], caption[own] = epochs.samples(turn[own], words[own, 1])
        caption[as_uniform(words[:, 0]) < self.caption_dropout] = NULL_CAPTION
        return SampleIndices(source, sample, caption)


class BucketSampler:
    """Samples by position where latents have several shapes: every batch has one shape.

    Batches are interleaved between shapes by how much of the data each has, and each shape has a
    sampler of its own. So every sample is shown equally often, but only with samples of its shape.

    Args:
        samplers: of each shape, with the numbers of their sources among all pairs of stores.
        shares: of all positions that each shape has, the largest first.
        batch_size: positions of a batch.
        version: see :class:`Interleave`.
    """

    def __init__(
        self,
        samplers: Sequence[tuple[MixtureSampler, Sequence[int]]],
        shares: Sequence[float],
        *,
        seed: int,
        batch_size: int,
        version: int = RANDOM_VERSION,
    ) -> None:
        self.samplers = list(samplers)
        self.interleave = Interleave(shares, seed, Purpose.SHAPES, version=version)
        self.batch_size = batch_size

    def indices(self, first: int, num: int) -> SampleIndices:
        """Samples and captions at positions ``first`` to ``first + num``."""
        # Batches of 4 positions, of which shape 0 has the first and the third, shape 1 the second:
        #
        #     position      0  1  2  3 | 4  5  6  7 | 8  9 10 11
        #     shape                  0 |          1 |          0
        #     turn                   0 |          0 |          1
        #     in its order  0  1  2  3 | 0  1  2  3 | 4  5  6  7
        #
        # Turns of a shape follow each other: from the first, its positions are one run.
        batch, before = divmod(first, self.batch_size)
        num_batches = -(-(before + num) // self.batch_size)
        shapes, turns = self.interleave.turns(batch, num_batches)
        of_position = np.repeat(shapes, self.batch_size)[before : before + num]
        found = SampleIndices(*np.empty((3, num), np.int64))
        for shape, index in zip(*np.unique(shapes, return_index=True), strict=True):
            sampler, numbers = self.samplers[int(shape)]
            own = of_position == shape
            start = int(turns[index]) * self.batch_size + (0 if index else before)
            part = sampler.indices(start, int(own.sum()))
            found.source[own] = np.asarray(numbers)[part.source]
            found.sample[own], found.caption[own] = part.sample, part.caption
        return found


class EpochShuffle:
    """The samples of one source, epoch after epoch, each in another order.

    By default an epoch is a permutation. With a window w it comes shard by shard, for disks and
    object stores that read whole shards faster than scattered samples. The n shards are in random
    order, and each sample of the s-th is put at a random point between s and s + w, modulo n. So w
    shards are mixed everywhere, one of them begins where another ends, and at w = n this is a
    permutation again. With n = 4 and w = 2::

        point        0       1       2       3       4
        1st shard    |---------------)
        2nd shard            |---------------)
        3rd shard                    |---------------)
        4th shard    --------)               |--------   around the end

    The caption, which decides the shard, is then a function of epoch and sample instead of the
    position.

    Args:
        key: of the source, added to the key of generators; empty for the first.
    """

    def __init__(
        self, source: SampleIndex, seed: int, key: tuple[int, ...], window: int | None
    ) -> None:
        self.source = source
        self.seed = seed
        self.window = window
        self._key = key
        self._cache: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._lock = threading.Lock()

    def samples(self, turns: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample and caption ids, int64 ``[P]`` each.

        Args:
            turns: how many samples of this source came before, ascending.
            bits: random bits that choose between captions, uint64 ``[P]``.
        """
        # Of 3 samples, turns 2 to 7 are the end of epoch 0, epoch 1, and the start of epoch 2:
        #
        #     turn      2 | 3  4  5 | 6
        #     epoch     0 | 1  1  1 | 2
        #     within    2 | 0  1  2 | 0     index into that epoch's order
        samples = np.empty(len(turns), np.int64)
        captions = np.empty(len(turns), np.int64)
        epoch, within = np.divmod(turns, len(self.source))
        numbers, starts = np.unique(epoch, return_index=True)
        for number, (start, stop) in zip(
            numbers.tolist(), pairwise([*starts.tolist(), len(turns)]), strict=True
        ):
            run = slice(start, stop)
            order, chosen = self.epoch(number)
            samples[run] = order[within[run]]
            if chosen is None:
                captions[run] = self.source.choose(samples[run], bits[run])
            else:
                captions[run] = chosen[samples[run]]
        return self.source.samples[samples], self.source.captions[captions]

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Every sample once, int64 ``[N]``, and by shards the caption of each, int64 ``[N]``; both
        as indices into the source. The last two epochs are cached."""
        with self._lock:
            if epoch not in self._cache:
                previous = {e: known for e, known in self._cache.items() if e == epoch - 1}
                order = self._random(epoch) if self.window is None else self._by_shards(epoch)
                self._cache = {**previous, epoch: order}
            return self._cache[epoch]

    def _random(self, epoch: int) -> tuple[np.ndarray, None]:
        generator = numpy_generator(self.seed, Purpose.PERMUTATION, epoch, *self._key)
        return generator.permutation(len(self.source)), None

    def _by_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.window is not None
        assert self.source.shards is not None
        bits = philox(self.seed, Purpose.SHARD_ORDER, epoch, *self._key)
        generator = np.random.Generator(bits)
        num = len(self.source)
        chosen = self.source.choose(np.arange(num), bits.random_raw(num))
        shards, shard = np.unique(self.source.shards[chosen], return_inverse=True)
        turn = generator.permutation(len(shards))[shard]  # [N], of each sample's shard
        window = min(self.window, len(shards))
        point = (turn + window * generator.random(num)) % len(shards)
        return np.argsort(point, kind="stable"), chosen


def make_sampler(
    pairs: Sequence[StorePair], data: DataConfig, seed: int, version: int = RANDOM_VERSION
) -> MixtureSampler | BucketSampler:
    """The sampler of all pairs of stores; where latents have several shapes, a batch has one.

    Args:
        version: ``TrainConfig.random_version``.

    Raises:
        InputError: proportions that leave nothing for the first pair.
    """
    window = data.window if data.order == "shards" else None
    options: dict[str, Any] = {"seed": seed, "version": version}
    dropping = options | {"caption_dropout": data.caption_dropout}
    shapes = [*by_shape(pairs).values()]
    if len(shapes) == 1:
        sources = [pair.index for pair in pairs]
        return MixtureSampler(
            sources, proportions=proportions(pairs)[1:], window=window, **dropping
        )
    samplers, shares = [], []
    for part, sources_of in enumerate(shapes):
        own = shares_of(pairs, sources_of)
        shares.append(sum(own))
        rest = [share / shares[-1] for share in own[1:]]
        sampler = MixtureSampler(
            [*sources_of.values()], proportions=rest, window=window, part=part, **dropping
        )
        samplers.append((sampler, [*sources_of]))
    return BucketSampler(samplers, shares, batch_size=data.batch_size, **options)
