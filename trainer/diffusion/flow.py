"""Rectified flow: the path between data and noise, the t that are trained, target and loss.

t is sigma: 0 is data, 1 is pure noise, and the shift is part of t (training and sampling share it).

Shapes: B batch; x is [B, ...], t is [B].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...schemas import FlowConfig

MIN_T = 0.2
"""Smallest t by which an error of x0 is divided."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - t) x0 + t noise (Liu et al. 2022; Esser et al. 2024, sections 3.1 and 5.3.2).

    Attributes:
        prediction: what the network predicts, ``velocity`` (noise - x0) or ``x0``.
        t_mean, t_std: mean and deviation of the logit of t, if it is normal, before the shift.
        shift: t <- shift t / (1 + (shift - 1) t).
        t_density: density of t in training, before the shift (Esser et al. 2024, section 3.1).
        mode_scale: s of density ``mode``.
        shift_area: latent pixels, height times width, that ``shift`` is for: see :meth:`at`.
        loss_weight: weight of a sample's loss by its t, see :meth:`weight`.
        min_snr_gamma: largest weight of ``min-snr``.
    """

    prediction: Literal["velocity", "x0"] = "velocity"
    t_mean: float = 0.0
    t_std: float = 1.0
    shift: float = 1.0
    t_density: Literal["logit-normal", "uniform", "mode", "cosine"] = "logit-normal"
    mode_scale: float = 1.29
    shift_area: int | None = None
    loss_weight: Literal["none", "min-snr"] = "none"
    min_snr_gamma: float = 5.0

    @classmethod
    def from_config(cls, config: FlowConfig) -> "Flow":
        return cls(**config.model_dump())

    def at(self, shape: Sequence[int]) -> "Flow":
        """The flow of latents of a shape (..., h, w): more pixels of the same noise hide less of an
        image, so its shift is ``shift sqrt(h w / shift_area)`` (Esser et al. 2024, section 5.3.2).
        """
        if self.shift_area is None:
            return self
        ratio = math.sqrt(shape[-2] * shape[-1] / self.shift_area)
        return replace(self, shift=self.shift * ratio, shift_area=None)

    def warp(self, t: Tensor) -> Tensor:
        """The shift: a monotone map of [0, 1] onto itself; above 1 it gives more of it to noise.

        It is that of latents of ``shift_area``, see :meth:`at`.
        """
        return self.shift * t / (self.shift * t + (1.0 - t))

    def sample_t(self, num: int, generator: torch.Generator) -> Tensor:
        """fp32 [num] in [0, 1] of the density, then shifted; on the generator's device."""
        if self.t_density == "logit-normal":
            z = torch.randn(num, generator=generator, device=generator.device)
            return self.warp(torch.sigmoid(self.t_mean + self.t_std * z))
        uniform = torch.rand(num, generator=generator, device=generator.device)
        return self.place_t(uniform.double())

    def place_t(self, uniform: Tensor) -> Tensor:
        """t of the density, shifted, from uniform numbers in [0, 1): fp64 [...] -> fp32 [...].

        Monotone: equal parts of [0, 1] give equal shares of the density.
        """
        u = uniform.double()
        match self.t_density:
            case "logit-normal":
                t = torch.sigmoid(self.t_mean + self.t_std * torch.special.ndtri(u))
            case "uniform":
                t = u
            case "mode":
                t = 1 - u - self.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
            case "cosine":
                t = 1 - 1 / ((math.pi / 2 * u).tan() + 1)
        return self.warp(t).float().clamp(0.0, 1.0)

    def interpolate(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of the shape of x0."""
        t = _like(t, x0)
        return (1.0 - t) * x0 + t * noise

    def to_velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity dx/dt of a prediction: (x_t - x0) / t where the network predicts x0.

        t must be above 0 in that case.
        """
        if self.prediction == "velocity":
            return prediction
        return (x_t - prediction) / _like(t, x_t)

    def advance(self, x: Tensor, velocity: Tensor, now: float, after: float) -> Tensor:
        """One step of Euler."""
        return x + (after - now) * velocity

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the velocity per sample: fp32 [B].

        Where the network predicts x0, the error of x0 is divided by max(t, 0.2)^2, which is the
        velocity's error except at small t.
        """
        target = noise - x0 if self.prediction == "velocity" else x0
        error = (prediction.float() - target.float()).square().flatten(1).mean(1)  # [B]
        return error if self.prediction == "velocity" else error / t.clamp(min=MIN_T).square()

    def weight(self, t: Tensor) -> Tensor | None:
        """Weight of :meth:`loss` in training: fp32 [B]; None where all weights are 1.

        ``min-snr``: the error of x0 has the weight min(SNR, gamma), with SNR = ((1 - t) / t)^2
        (Hang et al. 2023, arXiv 2303.09556).
        """
        if self.loss_weight == "none":
            return None
        # The loss is the error of x0 divided by t^2, or by max(t, 0.2)^2.
        divided = t if self.prediction == "velocity" else t.clamp(min=MIN_T)
        signal = (1.0 - t).square() / t.square().clamp(min=TINY)
        return signal.clamp(max=self.min_snr_gamma) * divided.square()

    def schedule(self, num_steps: int) -> Tensor:
        """The t of a solver: fp64 [num_steps + 1] on the CPU, from exactly 1 down to exactly 0.

        Equal steps, to which the shift of training is applied.

        Raises:
            ValueError: fewer than one step.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; a schedule needs at least 1")
        return self.warp(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))


def _like(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], which broadcasts with x."""
    return t.reshape(-1, *[1] * (x.ndim - 1))
