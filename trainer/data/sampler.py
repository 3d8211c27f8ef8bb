"""Which sample and which caption comes when. Arithmetic: nothing is read.

What stands at a position is a pure function of (seed, position). Into how many parts the positions
are cut, who reads them and after how many restarts make no difference.

Shapes: P positions, N samples, M captions of all samples, S sources.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ...pipeline.store.features import NULL_CAPTION
from ...schemas import DataConfig, InputError
from ...schemas.seeds import as_uniform, philox, seeded_generator
from .dataset import SampleIndex, StorePair, by_shape, proportions, shares_of

BLOCK = 1024
"""Positions over which a mixture keeps its proportions, to a sample."""
# What a generator is for, the second word of its seed; others have those between.
_PERMUTATION, _CHOICE, _SHARDS, _MIXTURE, _SHAPES = 0, 1, 8, 9, 10


@dataclass(frozen=True)
class SampleIndices:
    """What stands at positions, int64 ``[P]`` each.

    Attributes:
        source: number of the pair of stores.
        sample: id in those stores.
        caption: id in those stores, :data:`NULL_CAPTION` where it is dropped.
    """

    source: np.ndarray
    sample: np.ndarray
    caption: np.ndarray


class Interleave:
    """Turns dealt to several in proportions, in an order that is a function of (key, turn).

    Args:
        shares: of each, that sum up to 1; the first takes what rounding leaves.
        key: words of the generators' seed, to which the number of a block is added.
    """

    def __init__(self, shares: Sequence[float], *key: int) -> None:
        self.shares = list(shares)
        self.key = key

    def turns(self, first: int, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Who has each of the turns ``first`` to ``first + num``, and how many it had before:
        int64 ``[num]``.

        In blocks of :data:`BLOCK` turns they have their shares, rounded so that over all blocks
        nothing is lost.
        """
        if len(self.shares) == 1:
            return np.zeros(num, np.int64), np.arange(first, first + num)
        blocks = range(first // BLOCK, -(-(first + num) // BLOCK))
        who, turns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for block in blocks:
            before = self._dealt(block)
            counts = self._dealt(block + 1) - before
            number = np.repeat(np.arange(len(counts)), counts)
            turn = np.arange(BLOCK) + np.repeat(before - (np.cumsum(counts) - counts), counts)
            mixed = seeded_generator(*self.key, block).permutation(BLOCK)
            place = np.argsort(number[mixed], kind="stable")  # of each in turn
            who.append(number[mixed])
            turns.append(np.empty(BLOCK, np.int64))
            turns[-1][place] = turn
        start = first - blocks.start * BLOCK
        here = slice(start, start + num)
        return np.concatenate(who)[here], np.concatenate(turns)[here]

    def _dealt(self, block: int) -> np.ndarray:
        """Turns that each had before a block: int64 ``[S]``."""
        others = [int(block * BLOCK * share) for share in self.shares[1:]]
        return np.array([block * BLOCK - sum(others), *others], np.int64)


class MixtureSampler:
    """Samples and captions by position.

    Positions are dealt to sources in their proportions. Each source deals its own out to its
    epochs: epoch e of N samples is those from e * N on, and holds every sample once.

    Args:
        sources: at least one, none of them empty.
        caption_dropout: share of positions that train the null caption.
        proportions: share of positions of every source but the first, which has the rest.
        window: None: any sample may follow any other. Otherwise samples come shard by shard, and
            each shard's are spread over those of so many shards: see :class:`EpochShuffle`.
        part: number of this order, where it is one of several.

    Raises:
        InputError: proportions leave too little for the first source.
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
    ) -> None:
        self.sources = list(sources)
        self.caption_dropout = caption_dropout
        self.proportions = [1.0 - sum(proportions), *proportions]
        parts = (0, part) if part else ()  # the first words of a seed stay as they are
        self.key = (seed, _CHOICE, *parts)
        self.deal = Interleave(self.proportions, seed, _MIXTURE, *parts)
        self.epochs = [
            EpochShuffle(
                source, seed, (number, part) if part else (number,) if number else (), window
            )
            for number, source in enumerate(sources)
        ]
        if len(sources) * 2 > BLOCK * self.proportions[0]:
            raise InputError(
                f"the proportions of a mixture, {', '.join(map(str, proportions))}, leave "
                f"{self.proportions[0]:.3g} of all samples for the first source; give them less"
            )

    def places(self, first: int, num: int) -> SampleIndices:
        """What stands at positions ``first`` to ``first + num``.

        Philox is counted by position: four words a position, of which the first decides dropout and
        the second the caption.
        """
        words = philox(*self.key).advance(first).random_raw(4 * num).reshape(-1, 4)
        source, turn = self.deal.turns(first, num)
        sample, caption = np.empty(num, np.int64), np.empty(num, np.int64)
        for number, epochs in enumerate(self.epochs):
            here = source == number
            sample[here], caption[here] = epochs.places(turn[here], words[here, 1])
        caption[as_uniform(words[:, 0]) < self.caption_dropout] = NULL_CAPTION
        return SampleIndices(source, sample, caption)


class BucketSampler:
    """An order of latents of several shapes, of which a batch holds one.

    Batches are dealt to shapes by how much of the data each is, and each shape has an order of its
    own. So every sample is shown as often as any other, but samples of a shape only together.

    Args:
        orders: of each shape, with the number of each of their sources.
        shares: of all positions that each shape has, the largest first.
        batch_size: positions of a batch.
    """

    def __init__(
        self,
        orders: Sequence[tuple[MixtureSampler, Sequence[int]]],
        shares: Sequence[float],
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        self.orders = list(orders)
        self.deal = Interleave(shares, seed, _SHAPES)
        self.batch_size = batch_size

    def places(self, first: int, num: int) -> SampleIndices:
        """What stands at positions ``first`` to ``first + num``."""
        found = []
        while num:
            batch, before = divmod(first, self.batch_size)
            here = min(num, self.batch_size - before)
            (shape,), (turn,) = self.deal.turns(batch, 1)
            order, numbers = self.orders[int(shape)]
            places = order.places(int(turn) * self.batch_size + before, here)
            found.append(replace(places, source=np.asarray(numbers)[places.source]))
            first, num = first + here, num - here
        columns = zip(*((p.source, p.sample, p.caption) for p in found), strict=True)
        return SampleIndices(*map(np.concatenate, columns))


class EpochShuffle:
    """The samples of one source, again and again in another order.

    By default an epoch is a permutation. With a window w it comes shard by shard, for disks and
    object stores that read whole shards faster than samples here and there: shards in a random
    order, counted from 0 to n, and each sample of shard s at a random place between s and s + w,
    modulo n. So everywhere w shards are mixed, one of them begins when another ends, and at w = n
    this is a permutation again. The caption, which decides the shard, is then a function of epoch
    and sample instead of the position.

    Args:
        key: of the source, added to the words of seeds; empty for the first.
    """

    def __init__(
        self, source: SampleIndex, seed: int, key: tuple[int, ...], window: int | None
    ) -> None:
        self.source = source
        self.seed = seed
        self.window = window
        self._key = key
        self._known: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._lock = threading.Lock()

    def places(self, turns: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample and caption ids, int64 ``[P]`` each.

        Args:
            turns: how many samples came before, ascending.
            words: random bits that choose among captions, uint64 ``[P]``.
        """
        places = np.empty(len(turns), np.int64)
        captions = np.empty(len(turns), np.int64)
        epoch, within = np.divmod(turns, len(self.source))
        numbers, starts = np.unique(epoch, return_index=True)
        for number, (start, stop) in zip(
            numbers.tolist(), pairwise([*starts.tolist(), len(turns)]), strict=True
        ):
            here = slice(start, stop)
            order, chosen = self.epoch(number)
            places[here] = order[within[here]]
            if chosen is None:
                captions[here] = self.source.choose(places[here], words[here])
            else:
                captions[here] = chosen[places[here]]
        return self.source.samples[places], self.source.captions[captions]

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Every sample once, int64 ``[N]``, and by shards the caption of each, int64 ``[N]``; both
        as places in the source."""
        with self._lock:
            if epoch not in self._known:
                kept = {e: known for e, known in self._known.items() if e == epoch - 1}
                made = self._random(epoch) if self.window is None else self._by_shards(epoch)
                self._known = {**kept, epoch: made}
            return self._known[epoch]

    def _random(self, epoch: int) -> tuple[np.ndarray, None]:
        generator = seeded_generator(self.seed, _PERMUTATION, epoch, *self._key)
        return generator.permutation(len(self.source)), None

    def _by_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.window is not None
        assert self.source.shards is not None
        bits = philox(self.seed, _SHARDS, epoch, *self._key)
        generator = np.random.Generator(bits)
        num = len(self.source)
        chosen = self.source.choose(np.arange(num), bits.random_raw(num))
        shards, shard = np.unique(self.source.shards[chosen], return_inverse=True)
        turn = generator.permutation(len(shards))[shard]
        window = min(self.window, len(shards))
        place = (turn + window * generator.random(num)) % len(shards)
        return np.argsort(place, kind="stable"), chosen


def make_sampler(
    pairs: Sequence[StorePair], data: DataConfig, seed: int
) -> MixtureSampler | BucketSampler:
    """Which sample of which pair comes when; where latents have several shapes, a batch has one.

    Raises:
        InputError: proportions that leave too little for the first pair.
    """
    window = data.window if data.order == "shards" else None
    options: dict[str, Any] = {"seed": seed, "caption_dropout": data.caption_dropout}
    shapes = [*by_shape(pairs).values()]
    if len(shapes) == 1:
        sources = [pair.source for pair in pairs]
        return MixtureSampler(sources, proportions=proportions(pairs)[1:], window=window, **options)
    orders, shares = [], []
    for part, sources_of in enumerate(shapes):
        own = shares_of(pairs, sources_of)
        shares.append(sum(own))
        rest = [share / shares[-1] for share in own[1:]]
        order = MixtureSampler(
            [*sources_of.values()], proportions=rest, window=window, part=part, **options
        )
        orders.append((order, [*sources_of]))
    return BucketSampler(orders, shares, seed=seed, batch_size=data.batch_size)
