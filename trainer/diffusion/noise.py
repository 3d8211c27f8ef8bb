"""Noise and noise levels of training and sampling."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .flow import Flow


def starting_noise(shape: tuple[int, ...], *, seed: int, numbers: Sequence[int]) -> Tensor:
    """Noise of samples: fp32 [len(numbers), *shape] on the CPU.

    Each sample's noise is a function of (seed, its number) alone, so that neither batches nor
    devices change a picture.
    """
    draws = []
    for number in numbers:
        state = int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])
        draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(state)))
    return torch.stack(draws)


def draw_noise(
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

    A function of seed and position as :func:`draw_noise`, whose numbers it leaves alone.
    """
    noise = []
    for position in range(first, first + len(t) // draws):
        key = np.random.SeedSequence((seed, 4, position))
        noise.append(np.random.Generator(np.random.Philox(key)).standard_normal(draws, np.float32))
    return (t + deviation * torch.from_numpy(np.concatenate(noise))).clamp(0.0, 1.0)
