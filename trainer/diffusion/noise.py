"""Noise and noise levels of training and sampling, each a function of seed and position.

Shapes: P positions, K noise draws per position, N images; noise is [P*K, *shape] or [N, *shape].
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...schemas.seeds import Purpose, UnnumberedPurpose, numpy_generator, torch_generator
from .ddpm import Ddpm
from .flow import Flow


def starting_noise(shape: tuple[int, ...], *, seed: int, numbers: Sequence[int]) -> Tensor:
    """Noise that sampling starts from: fp32 [N, *shape] on the CPU.

    An image's noise is a function of (seed, its number) alone, so neither batches nor devices
    change an image.
    """
    purpose = UnnumberedPurpose.STARTING_NOISE
    generators = (torch_generator(seed, purpose, number) for number in numbers)
    return torch.stack([torch.randn(shape, generator=each) for each in generators])


def draw_noise(
    flow: Flow | Ddpm, shape: tuple[int, ...], *, seed: int, first: int, num: int, draws: int
) -> tuple[Tensor, Tensor]:
    """t [P*K] and noise [P*K, *shape] of ``num`` global positions from ``first`` on, on the CPU.

    Each position has a generator of its own, so neither ranks nor accumulation steps nor devices
    nor restarts change what a sample is trained with.
    """
    flow, t, noise = flow.at(shape), [], []
    for position in range(first, first + num):
        generator = torch_generator(seed, Purpose.NOISE, position)
        t.append(flow.sample_t(draws, generator))
        noise.append(torch.randn(draws, *shape, generator=generator))
    return torch.cat(t), torch.cat(noise)


def jitter(t: Tensor, deviation: float, *, seed: int, first: int, draws: int) -> Tensor:
    """The t that routing sees in training: t [P*K] with noise, clipped to [0, 1].

    A function of seed and position like :func:`draw_noise`, whose numbers it does not change.
    """
    positions = range(first, first + len(t) // draws)
    generators = (numpy_generator(seed, Purpose.T_JITTER, position) for position in positions)
    noise = [each.standard_normal(draws, np.float32) for each in generators]
    return (t + deviation * torch.from_numpy(np.concatenate(noise))).clamp(0.0, 1.0)
