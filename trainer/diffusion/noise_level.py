"""How noisy is a latent really? Clocks for routing that depends on t.

Gates learn which layers to read at noise level t. In training x_t has that much noise by
construction. In sampling it has what the solver and guidance left in it, and the nominal t of the
schedule is only its label (arXiv 2602.03510 names this the mismatch of time-wise routing). A clock
says which t the gates are told: the nominal one, a shifted one, or one that is estimated from x_t
itself. The network and the solver keep the nominal t.

The model of a latent behind all of it: x = a x_0 + s n, with n of unit variance, is x_t times a
factor for t = s / (a + s).

Shapes: B batch, C channels, F features, M random frequencies, K bins of t.
"""

from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...schemas import InputError, write_whole

MIN_LATENTS = 50
NUM_FREQUENCIES = 1000
RIDGE = 0.1
LENGTH = 2.0
"""Of the Gaussian kernel, in units of the root of the number of features."""
DRAWS = 4
"""Noise levels that each latent is calibrated at."""
NUM_BINS = 20
QUANTILE = 0.99
LEVELS = np.linspace(0.1, 0.9, 9)


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t), a monotone map of [0, 1] onto itself; below 1 towards 0."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def effective_t(x: Tensor, final: Tensor) -> Tensor:
    """The noise level of latents by where their trajectory ended: the oracle.

    The part of x along the final latent x_0 is signal, the rest is noise: a = <x, x_0> / <x_0,
    x_0>, s = rms(x - a x_0), t = s / (a + s). For x = (1 - t) x_0 + t n it is t but for chance
    correlations of x_0 and n, which fall with the root of the number of elements. The paper
    measures "from the model's own final latent"; this formula is our reconstruction.

    Args:
        x, final: [B, C, h, w].

    Returns:
        fp32 [B] in [0, 1].
    """
    x, final = x.float().flatten(1), final.float().flatten(1)
    power = final.square().sum(1).clamp(min=1e-12)
    signal = ((x * final).sum(1) / power).clamp(min=0.0)
    noise = (x - signal[:, None] * final).square().mean(1).sqrt()
    return noise / (signal + noise).clamp(min=1e-12)


def describe(x: Tensor) -> Tensor:
    """What tells noise from picture: fp32 [B, F] of latents [B, C, h, w].

    Latents are divided by their RMS first: a common factor changes nothing, as it does not change a
    signal-to-noise ratio. Then nine quantiles of each channel, and of up to three levels of a Haar
    pyramid the logarithm of the RMS of details, and their mean and median absolute value relative
    to it: noise is Gaussian and equal on all scales, pictures are neither.
    """
    x = x.float()
    x = x / x.square().mean((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    found = [torch.quantile(x.flatten(2), levels, dim=2).permute(1, 2, 0).flatten(1)]
    for _ in range(3):
        height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        if min(height, width) < 2:
            break
        x = x[..., :height, :width]
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], 2).flatten(2) / 2
        size = details.abs()
        rms = details.square().mean(2).clamp(min=1e-8).sqrt()  # [B, C]
        found += [rms.log(), size.mean(2) / rms, size.median(2).values / rms]
        x = (a + b + c + d) / 2
    return torch.cat(found, 1)


@dataclass(frozen=True)
class NoiseLevelEstimator:
    """t from x_t alone: ridge regression on random Fourier features (Rahimi & Recht 2007).

    Calibrated on latents with noise of known t. What it says of latents that are like none of
    these is a guess, so it also says how far they are from them.

    Attributes:
        mean, scale: fp32 [F], of the features.
        frequencies: fp32 [F, M], phases: fp32 [M].
        weights: fp32 [M + F + 1].
        centres: fp32 [K, F], standardised features by bin of t; spreads: fp32 [K, F].
        limits: fp32 [K], 99 % of calibration latents lie nearer to their bin's centre.
        errors: fp32 [K], mean absolute error of t by bin, on latents that were not fitted.
    """

    mean: Tensor
    scale: Tensor
    frequencies: Tensor
    phases: Tensor
    weights: Tensor
    centres: Tensor
    spreads: Tensor
    limits: Tensor
    errors: Tensor
    _copies: dict[torch.device, "NoiseLevelEstimator"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [B] in [0, 1] of latents [B, C, h, w]."""
        return (self._lift(self._standardised(x)) @ self.weights).clamp(0.0, 1.0)

    def outside(self, x: Tensor) -> Tensor:
        """Whether latents are farther from the calibration latents of their t than 99 % of these
        are: bool [B]. There the estimate is not calibrated."""
        features = self._standardised(x)
        bins = _bins(self(x))
        return self._distance(features, bins) > self.limits[bins]

    @property
    def error(self) -> float:
        """Mean absolute error of t on latents that were not fitted, t uniform."""
        return float(self.errors.mean())

    def on(self, device: torch.device) -> "NoiseLevelEstimator":
        """The same on a device; itself where it is there."""
        if self.mean.device == device:
            return self
        if device not in self._copies:
            moved = {each.name: getattr(self, each.name).to(device) for each in self._tensors()}
            self._copies[device] = NoiseLevelEstimator(**moved)
        return self._copies[device]

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {each.name: getattr(self, each.name).contiguous() for each in self._tensors()}
        write_whole(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> "NoiseLevelEstimator":
        """What :meth:`save` wrote.

        Raises:
            InputError: not the file of an estimator.
        """
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError, OSError) as error:
            raise InputError(
                f"{path} is no calibrated clock ({error}): remove it, and it is made anew"
            ) from error

    @classmethod
    def _tensors(cls) -> list[Field]:
        return [each for each in fields(cls) if each.init]

    def _standardised(self, x: Tensor) -> Tensor:
        features = describe(x)
        if features.shape[1] != len(self.mean):
            raise InputError(
                f"latents {list(x.shape[1:])} have {features.shape[1]} features, but this clock "
                f"was calibrated on latents with {len(self.mean)}: calibrate it on such latents"
            )
        return (features - self.mean) / self.scale

    def _lift(self, features: Tensor) -> Tensor:
        ones = torch.ones_like(features[:, :1])
        waves = torch.cos(features @ self.frequencies + self.phases)
        return torch.cat([waves, features, ones], 1)  # [B, M + F + 1]

    def _distance(self, features: Tensor, bins: Tensor) -> Tensor:
        away = (features - self.centres[bins]) / self.spreads[bins]
        return away.square().mean(1).sqrt()


def calibrate(latents: Tensor, *, seed: int = 0) -> NoiseLevelEstimator:
    """Fit an estimator to latents [B, C, h, w]: four fifths are fitted, the rest tells its error.

    Raises:
        InputError: fewer latents than can be split and binned.
    """
    if len(latents) < MIN_LATENTS:
        raise InputError(
            f"found {len(latents)} latents to calibrate a clock on, expected at least {MIN_LATENTS}"
        )
    generator = torch.Generator().manual_seed(seed)
    latents = latents[torch.randperm(len(latents), generator=generator)].cpu().float()
    cut = len(latents) * 4 // 5
    fitted, t = _noised(latents[:cut], generator)
    fresh, t_fresh = _noised(latents[cut:], generator)
    features = describe(fitted)
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    features = (features - mean) / scale
    num = features.shape[1]
    frequencies = torch.randn(num, NUM_FREQUENCIES, generator=generator) / (LENGTH * num**0.5)
    phases = 2 * torch.pi * torch.rand(NUM_FREQUENCIES, generator=generator)
    bins = _bins(t)
    members = [features[bins == number] for number in range(NUM_BINS)]
    centres = torch.stack([part.mean(0) for part in members])
    spreads = torch.stack([part.std(0).clamp(min=1e-6) for part in members])
    none = torch.zeros(NUM_BINS)
    blank = torch.zeros(NUM_FREQUENCIES + num + 1)
    draft = NoiseLevelEstimator(
        mean, scale, frequencies, phases, blank, centres, spreads, limits=none, errors=none
    )
    lifted = draft._lift(features).double()
    gram = lifted.T @ lifted
    gram.diagonal().add_(RIDGE)
    weights = torch.linalg.solve(gram, lifted.T @ t.double()).float()
    draft = replace(draft, weights=weights)
    bins = _bins(t_fresh)
    away = draft._distance(draft._standardised(fresh), bins)
    wrong = (draft(fresh) - t_fresh).abs()
    each = [bins == number for number in range(NUM_BINS)]
    limits = torch.stack([torch.quantile(away[part], QUANTILE) for part in each])
    errors = torch.stack([wrong[part].mean() for part in each])
    return replace(draft, limits=limits, errors=errors)


def _noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents under several t each, which are spread evenly: [DRAWS * B, C, h, w], [DRAWS * B]."""
    x0 = latents.repeat(DRAWS, 1, 1, 1)
    num = len(x0)
    t = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    t = t[torch.randperm(num, generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    at = t.reshape(-1, 1, 1, 1)
    return (1 - at) * x0 + at * noise, t


def _bins(t: Tensor) -> Tensor:
    return (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
