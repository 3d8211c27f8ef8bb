"""Random numbers by seed, purpose and position.

Every random choice that a store or a run depends on has a generator of its own, whose key says what
is chosen: the seed, the purpose, and the position, epoch or id that it is for. So neither batches
nor ranks nor restarts change what is chosen, and one purpose does not disturb another.

    (seed, Purpose.NOISE, position)                         noise that a position is trained with
    (seed, Purpose.PERMUTATION, epoch, ...)                 order of an epoch
    (seed, caption)                                         UnnumberedPurpose.LAYER_ORDER

Keys are part of what a release computes: a number here is never changed and never used again.
``SeedSequence`` pads keys with zeros, so (7, 2) and (7, 2, 0) are the same key.
"""

from collections.abc import Iterable, Iterator
from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


RANDOM_VERSION = 2
"""Version of the arithmetic of noise, t, and turns in mixtures that new runs take, see
``TrainConfig.random_version``."""


class Purpose(IntEnum):
    """Purpose of a generator: the second word of its key."""

    PERMUTATION = 0
    """Order of samples in an epoch: epoch, and the source within a mixture."""
    CHOICE = 1
    """Caption dropout, and the choice among captions of a sample; counted by position."""
    NOISE = 2
    """Noise levels and noise that a sample is trained with, of ``random_version`` 1: position."""
    POSTERIOR = 3
    """Noise by which a latent is sampled from its posterior: position."""
    T_JITTER = 4
    """Noise on the t that routing sees in training: position."""
    HELD_OUT = 6
    """Samples that are held out for validation; counted by sample id."""
    VALIDATION_NOISE = 7
    """Noise levels and noise of validation: sample id."""
    SHARD_ORDER = 8
    """Order of shards, and of samples within the window: epoch, and the source."""
    MIXTURE = 9
    """Order in which the sources of a mixture take turns: block of turns."""
    SHAPES = 10
    """Order in which shapes of latents take turns: block of turns."""
    T = 11
    """Noise levels that a sample is trained with: position. Counted, see :func:`counted`."""
    GAUSSIAN = 12
    """Noise that a sample is trained with: position. Counted."""
    CODEC_FIT = 13
    """Axes that the search for those of codec ``predictive`` begins with: no position."""


class UnnumberedPurpose(Enum):
    """Purposes whose keys have no number, because their bits are older than the numbers."""

    STARTING_NOISE = auto()
    """Noise that sampling starts from: (seed, number of the image)."""
    LAYER_ORDER = auto()
    """Layers of a caption in random order, a control: (seed, caption id)."""
    CAPTION_ORDER = auto()
    """Order of captions in a store, by PCG64: (seed,), and (seed, generation) after an append."""


def seed_sequence(
    seed: int, purpose: Purpose | UnnumberedPurpose, *position: int
) -> np.random.SeedSequence:
    """The key as numpy's source of entropy."""
    number = (int(purpose),) if isinstance(purpose, Purpose) else ()
    return np.random.SeedSequence((seed, *number, *position))


def philox(seed: int, purpose: Purpose | UnnumberedPurpose, *position: int) -> np.random.Philox:
    """A counter-based bit generator, which ``advance`` moves to any position at once."""
    return np.random.Philox(seed_sequence(seed, purpose, *position))


def numpy_generator(
    seed: int, purpose: Purpose | UnnumberedPurpose, *position: int
) -> np.random.Generator:
    """A generator of numpy; of captions' order PCG64, otherwise Philox."""
    if purpose is UnnumberedPurpose.CAPTION_ORDER:
        return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *position)))
    return np.random.Generator(philox(seed, purpose, *position))


def counted(seed: int, purpose: Purpose, positions: Iterable[int]) -> Iterator[np.random.Generator]:
    """A generator for each position: Philox with one key of 128 bits, and the position, of up to 64
    bits, in the upper half of its counter. So no two positions ever share a number."""
    key = seed_sequence(seed, purpose).generate_state(2, np.uint64)
    for position in positions:
        yield np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, 0]))


def torch_generator(
    seed: int, purpose: Purpose | UnnumberedPurpose, *position: int
) -> "torch.Generator":
    """A generator of torch on the CPU, so that devices do not change what it gives. It uses 32 bits
    of the key."""
    import torch

    state = seed_sequence(seed, purpose, *position).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def as_uniform(bits: np.ndarray) -> np.ndarray:
    """Random bits as numbers in [0, 1): uint64 -> float64, of which 53 bits are used."""
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)
