"""Which shards of a store a run needs at which of its positions: a function of its configuration
and of the tables alone, so that extraction and training agree without talking.

Positions are cut into granules, of a batch or more. A run that is in a granule needs all of its
shards, and those of the batch after it: a step is not taken before the next batch is read, which is
copied to a device meanwhile. Shapes: N pairs of a granule and a shard.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from ....schemas import InputError, TrainConfig
from ....schemas.budget import check_order
from ....schemas.files import locate
from ....schemas.seeds import RANDOM_VERSION
from ..features import NULL_CAPTION, FeatureStore
from ..open import open_followed, open_latents
from ..order.dataset import StorePair, held_out, open_pairs, validation_samples
from ..order.sampler import BucketSampler, MixtureSampler, make_sampler

if TYPE_CHECKING:
    from ..latents import LatentStore

BLOCK_POSITIONS = 65_536
"""Positions whose samples are drawn at a time, about."""
GRANULES_PER_SHARD = 8
"""Granules in which a shard of samples would be read, about, if it were read alone."""


@dataclass(frozen=True, eq=False)
class ShardNeeds:
    """The shards of one store that one run needs, by position.

    Attributes:
        shard_of: shard of each caption, int ``[captions]``.
        sampler: of the run.
        sources: numbers of the run's pairs of stores whose features are this store.
        batch_size: positions of a step.
        stop: positions until the run ends.
        granule: positions of a granule, a multiple of the batch.
        kept: shards that are needed at any time, and are left out elsewhere.
        epoch: positions of an epoch.
    """

    shard_of: np.ndarray
    sampler: MixtureSampler | BucketSampler
    sources: list[int]
    batch_size: int
    stop: int
    granule: int
    kept: frozenset[int]
    epoch: int
    _blocks: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: FeatureStore, config: TrainConfig) -> "ShardNeeds":
        """The needs of a run.

        Raises:
            InputError: it does not read this store, or not in the order of its shards; its stores
                do not belong together.
        """
        where = store.path.resolve()
        own = locate(config.features)
        features = store if own.resolve() == where else open_followed(own)
        first, *others = open_pairs(
            features, open_latents(config.latents, all_columns=False), config.data
        )
        pairs = [first.without(held_out(config.validation, first.latents.ids)), *others]
        sources = [n for n, pair in enumerate(pairs) if pair.features.path.resolve() == where]
        if not sources:
            raise InputError(
                f"{config.output} reads {config.features}, not {store.path}, which is to follow it"
            )
        check_order(config, str(store.path))
        shard_of = store.shards()
        num_samples = sum(len(pair.index) for pair in pairs)
        per_shard = num_samples // store.manifest.layout.num_shards
        batch_size = config.data.batch_size
        steps = max(1, min(per_shard // GRANULES_PER_SHARD, BLOCK_POSITIONS) // batch_size)
        return cls(
            shard_of,
            make_sampler(pairs, config.data, config.seed, config.random_version or RANDOM_VERSION),
            sources,
            batch_size,
            stop=config.steps * batch_size,
            granule=steps * batch_size,
            kept=frozenset(shard_of[_always(config, features, first, sources)].tolist()),
            epoch=num_samples,
        )

    def ahead(self, position: int, num_shards: int) -> tuple[np.ndarray, np.ndarray]:
        """Granules from a position on, by where they begin, and the shards that they need: int64
        ``[N]`` each, in order. They end once so many shards are among them, or where the run does.
        """
        starts: list[np.ndarray] = []
        shards: list[np.ndarray] = []
        found: set[int] = set()
        first = position // self.granule * self.granule
        self._drop_blocks(first)
        for block in count(first // self._block_size):
            if block * self._block_size >= self.stop or len(found) >= num_shards:
                break
            start, shard = self._block(block)
            own = start >= first
            starts.append(start[own])
            shards.append(shard[own])
            found.update(np.unique(shard[own]).tolist())
        if position >= self.stop or not starts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(starts), np.concatenate(shards)

    def steps_before(self, position: int, absent: np.ndarray, num_shards: int) -> int:
        """Steps that the run can do before it needs a shard that is absent.

        Args:
            absent: mask over shards.
            num_shards: that may be on disk.
        """
        starts, shards = self.ahead(position, num_shards + 1)
        missing = np.flatnonzero(absent[shards])
        stop = int(starts[missing[0]]) if len(missing) else self.stop
        return max(0, stop - position) // self.batch_size

    def largest(self, sizes: np.ndarray) -> int:
        """Bytes that the shards of one granule take, at most, in the first two epochs.

        Args:
            sizes: bytes of each shard, ``[shards]``.
        """
        most = 0
        for block in range(-(-min(self.stop, 2 * self.epoch) // self._block_size)):
            starts, shards = self._block(block)
            _, granule = np.unique(starts, return_inverse=True)
            most = max(most, int(np.bincount(granule, sizes[shards]).max(initial=0)))
            self._drop_blocks(block * self._block_size)
        return most

    @cached_property
    def _block_size(self) -> int:
        return max(1, BLOCK_POSITIONS // self.granule) * self.granule

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a granule, by where it begins, and a shard that it needs; int64 ``[N]`` each."""
        # With batches of 2 positions and granules of 4, of which two are a block:
        #
        #     position    0  1  2  3 | 4  5  6  7 | 8  9
        #     granule     0  0  0  0 | 4  4  4  4 |
        #     and before             | 0  0       | 4  4     as the batch after it
        if block not in self._blocks:
            first = block * self._block_size
            stop = min(first + self._block_size, self.stop)
            indices = self.sampler.indices(first, stop + self.batch_size - first)
            own = np.flatnonzero(np.isin(indices.source, self.sources))
            shard = self.shard_of[indices.caption[own]].astype(np.int64)
            granule = own // self.granule * self.granule
            after = own - granule < self.batch_size
            start = np.concatenate([granule, granule[after] - self.granule])
            shard = np.concatenate([shard, shard[after]])
            inside = (start >= 0) & (start < stop - first) & ~np.isin(shard, [*self.kept])
            num_shards = int(self.shard_of.max()) + 1
            pairs = np.unique(start[inside] * num_shards + shard[inside])
            self._blocks[block] = first + pairs // num_shards, pairs % num_shards
        return self._blocks[block]

    def _drop_blocks(self, position: int) -> None:
        for block in [b for b in self._blocks if (b + 1) * self._block_size <= position]:
            del self._blocks[block]


def _always(
    config: TrainConfig, features: FeatureStore, first: StorePair, sources: list[int]
) -> np.ndarray:
    """Captions that a run may read at any time: int64 ids."""
    ids = np.array([NULL_CAPTION], np.int64)
    if config.validation.share and 0 in sources:
        latents: LatentStore = first.latents
        samples = validation_samples(config.validation, latents.ids)
        ids = np.concatenate([ids, features.first_captions[samples]])
    return ids
