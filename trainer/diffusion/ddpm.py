"""The path of a DDPM (Ho et al. 2020), which networks before rectified flow were trained on.

t of (s + 1) / 1000 stands for step s of 1,000; t = 0 is data. It has the interface of
:class:`.flow.Flow`; a prediction is the noise.

Shapes: B batch; x is [B, ...], t is [B].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...schemas import InputError

NUM_STEPS = 1000


@dataclass(frozen=True, eq=False)
class Ddpm:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    Attributes:
        kept: abar of t = 0, 1/1000, ..., 1: fp32 [1001], from 1 downwards.
        min_snr_gamma: gamma of the loss weights, see :meth:`weight`; None: all weights are 1.
    """

    kept: Tensor
    min_snr_gamma: float | None = None

    @classmethod
    def from_scheduler(
        cls, config: Mapping[str, Any], min_snr_gamma: float | None = None
    ) -> "Ddpm":
        """The path of a scheduler's configuration in diffusers.

        Raises:
            InputError: no configuration, or a network that predicts something else than noise.
        """
        from diffusers import DDPMScheduler

        if not config or config.get("prediction_type", "epsilon") != "epsilon":
            raise InputError(
                f"the scheduler's prediction_type is {config.get('prediction_type')}, expected "
                "epsilon"
            )
        scheduler = DDPMScheduler.from_config(dict(config))
        return cls(torch.cat([torch.ones(1), scheduler.alphas_cumprod.float()]), min_snr_gamma)

    def _kept(self, t: Tensor) -> Tensor:
        return self.kept.to(t.device)[(t * NUM_STEPS).round().long()]

    def sample_t(self, num: int, generator: torch.Generator) -> Tensor:
        """fp32 [num]: uniform over the steps; on the generator's device."""
        steps = torch.randint(NUM_STEPS, (num,), generator=generator, device=generator.device)
        return (steps + 1).float() / NUM_STEPS

    def place_t(self, uniform: Tensor) -> Tensor:
        """t from uniform numbers in [0, 1), uniform over the steps: fp64 [...] -> fp32 [...]."""
        return ((uniform.double() * NUM_STEPS).floor().clamp(max=NUM_STEPS - 1) + 1).float() / (
            NUM_STEPS
        )

    def warp(self, t: Tensor) -> Tensor:
        """t itself: there is no shift."""
        return t

    def at(self, _shape: Sequence[int]) -> "Ddpm":
        """The path itself, which is the same for all shapes of latents."""
        return self

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of the shape of x0."""
        kept = _like(self._kept(t), x0)
        return kept.sqrt() * x0 + (1 - kept).sqrt() * noise

    def to_velocity(self, prediction: Tensor, _x_t: Tensor, _t: Tensor) -> Tensor:
        """What guidance mixes and :meth:`advance` takes: the noise."""
        return prediction

    def advance(self, x: Tensor, noise: Tensor, now: float, after: float) -> Tensor:
        """One step of DDIM (arXiv 2010.02502, equation 12 with eta = 0)."""
        here, there = self._kept(torch.tensor([now, after], dtype=torch.float64)).tolist()
        x0 = (x - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * x0 + (1 - there) ** 0.5 * noise

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the noise per sample: fp32 [B]."""
        return (prediction.float() - noise.float()).square().flatten(1).mean(1)

    def weight(self, t: Tensor) -> Tensor | None:
        """Weight of :meth:`loss` in training: min(SNR, gamma) / SNR (Hang et al. 2023, arXiv
        2303.09556), fp32 [B]; None where all weights are 1."""
        if self.min_snr_gamma is None:
            return None
        kept = self._kept(t)
        snr = kept / (1 - kept)
        return snr.clamp(max=self.min_snr_gamma) / snr

    def schedule(self, num_steps: int) -> Tensor:
        """The t of a solver: fp64 [num_steps + 1] on the CPU, from exactly 1 down to exactly 0.

        Raises:
            ValueError: fewer than one step, or more than the path has.
        """
        if not 1 <= num_steps <= NUM_STEPS:
            raise ValueError(f"num_steps is {num_steps}; expected 1 to {NUM_STEPS}")
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], which broadcasts with x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))
