"""Random numbers by seed, purpose and position."""

import numpy as np


def philox(*words: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(words))


def seeded_generator(*words: int) -> np.random.Generator:
    return np.random.Generator(philox(*words))


def as_uniform(words: np.ndarray) -> np.ndarray:
    """Random bits as numbers in [0, 1): uint64 -> float64 of 53 bits."""
    return np.asarray((words >> np.uint64(11)) * 2.0**-53)
