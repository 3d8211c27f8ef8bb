"""Noise and noise levels of training and sampling, each a function of seed and position.

Shapes: P positions, K noise draws per position, N images; noise is [P*K, *shape] or [N, *shape].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...schemas.seeds import (
    RANDOM_VERSION,
    Purpose,
    UnnumberedPurpose,
    counted,
    numpy_generator,
    torch_generator,
)
from .ddpm import Ddpm
from .flow import Flow

Allocate = Callable[..., Tensor]
"""(shape, dtype=...) -> an uninitialised tensor on the CPU."""


def starting_noise(shape: tuple[int, ...], *, seed: int, numbers: Sequence[int]) -> Tensor:
    """Noise that sampling starts from: fp32 [N, *shape] on the CPU.

    An image's noise is a function of (seed, its number) alone, so neither batches nor devices
    change an image.
    """
    purpose = UnnumberedPurpose.STARTING_NOISE
    generators = (torch_generator(seed, purpose, number) for number in numbers)
    return torch.stack([torch.randn(shape, generator=each) for each in generators])


@dataclass(frozen=True)
class Draws:
    """What K noise draws of each of P positions are trained with.

    Attributes:
        t: fp32 [P*K].
        noise: fp32 [P*K, *shape].
        t_routing: fp32 [P*K], the t that routing sees.
    """

    t: Tensor
    noise: Tensor
    t_routing: Tensor

    def to(self, device: torch.device | str) -> "Draws":
        """The same on a device."""
        return Draws(*(each.to(device, non_blocking=True) for each in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tensors, in the order of the attributes."""
        return self.t, self.noise, self.t_routing


@dataclass(frozen=True)
class NoiseSource:
    """Noise levels and noise of training, each a function of seed and position.

    Each position has generators of its own, so neither ranks nor accumulation steps nor devices nor
    restarts change what a sample is trained with.

    Attributes:
        draws: K, noise draws per position.
        t_jitter: standard deviation of noise on the t that routing sees.
        version: ``TrainConfig.random_version``.
    """

    flow: Flow | Ddpm
    seed: int
    draws: int = 1
    t_jitter: float = 0.0
    version: int = RANDOM_VERSION

    def draw(
        self, first: int, num: int, shape: tuple[int, ...], empty: Allocate = torch.empty
    ) -> Draws:
        """Draw for ``num`` global positions from ``first`` on, on the CPU.

        Only by numpy, or by operators of torch that run on one thread: a thread that reads has no
        team of OpenMP.

        Args:
            shape: of one latent.
            empty: (shape, dtype=float32) -> a tensor to write to, for example in pinned memory.
        """
        size = num * self.draws
        noise = empty((size, *shape), dtype=torch.float32)
        flow, positions = self.flow.at(shape), range(first, first + num)
        if self.version == 1:
            t = self._fill_with_torch(flow, positions, noise)
        else:
            t = self._fill(flow, positions, noise)
        t_routing = t
        if self.t_jitter:
            t_routing = jitter(t, self.t_jitter, seed=self.seed, first=first, draws=self.draws)
        return Draws(_moved(t, empty), noise, _moved(t_routing, empty))

    def _fill(self, flow: Flow | Ddpm, positions: range, noise: Tensor) -> Tensor:
        """Write the noise, and return t: fp32 [P*K]."""
        parts = noise.numpy().reshape(len(positions), -1)  # [P, K*...]
        generators = counted(self.seed, Purpose.GAUSSIAN, positions)
        for part, generator in zip(parts, generators, strict=True):
            generator.standard_normal(dtype=np.float32, out=part)
        levels = [each.random(self.draws) for each in counted(self.seed, Purpose.T, positions)]
        return flow.place_t(torch.from_numpy(np.concatenate(levels)))

    def _fill_with_torch(self, flow: Flow | Ddpm, positions: range, noise: Tensor) -> Tensor:
        """:meth:`_fill` of version 1, whose generators use 32 bits of their key."""
        t = []
        for number, position in enumerate(positions):
            generator = torch_generator(self.seed, Purpose.NOISE, position)
            t.append(flow.sample_t(self.draws, generator))
            part = noise[number * self.draws : (number + 1) * self.draws]
            torch.randn(part.shape, generator=generator, out=part)
        return torch.cat(t)


def _moved(t: Tensor, empty: Allocate) -> Tensor:
    own = empty(tuple(t.shape), dtype=torch.float32)
    own.numpy()[:] = t.numpy()
    return own


def jitter(t: Tensor, deviation: float, *, seed: int, first: int, draws: int) -> Tensor:
    """The t that routing sees in training: t [P*K] with noise, clipped to [0, 1].

    A function of seed and position like all else that :class:`NoiseSource` draws, whose numbers it
    does not change.
    """
    positions = range(first, first + len(t) // draws)
    generators = (numpy_generator(seed, Purpose.T_JITTER, position) for position in positions)
    noise = [each.standard_normal(draws, np.float32) for each in generators]
    return (t + deviation * torch.from_numpy(np.concatenate(noise))).clamp(0.0, 1.0)
