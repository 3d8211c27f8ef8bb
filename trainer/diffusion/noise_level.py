"""The actual noise level of a latent, for routing that depends on t.

Gates learn which layers to read at noise level t. In training x_t has that much noise by
construction. In sampling it has what solver and guidance left in it, and the nominal t of the
schedule is only a label (arXiv 2602.03510 calls this the mismatch of time-wise routing). A clock
gives the t that routing sees: the nominal t, a shifted one, or one estimated from x_t itself. The
network and the solver keep the nominal t.

The model of a latent behind this: x = a x_0 + s n, with n of unit variance, is a multiple of x_t
for t = s / (a + s).

Shapes: B batch, C channels, F features, M random frequencies, K bins of t.
"""

from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ...schemas import InputError, write_whole
from ...schemas.tensor_files import load_tensors

MIN_LATENTS = 50
"""Fewest latents to calibrate on."""
NUM_FREQUENCIES = 1000
RIDGE = 0.1
LENGTH = 2.0
"""Length of the Gaussian kernel, in units of the root of the number of features."""
DRAWS = 4
"""Noise levels per latent in calibration."""
NUM_BINS = 20
"""Equal bins of t."""
QUANTILE = 0.99
"""Share of calibration latents within a bin's limit."""
LEVELS = np.linspace(0.1, 0.9, 9)
"""Quantiles of each channel that are features."""


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t), a monotone map of [0, 1] onto itself; towards 0 below 1."""
    return shift * t / (1.0 + (shift - 1.0) * t)


def noise_features(x: Tensor) -> Tensor:
    """Features that distinguish noise from image: fp32 [B, F] of latents [B, C, h, w].

    Latents are first divided by their RMS, since a common factor does not change a signal-to-noise
    ratio. Features are nine quantiles of each channel and, for up to three levels of a Haar
    pyramid, the logarithm of the RMS of details, and their mean and median absolute value relative
    to it: noise is Gaussian and equal on all scales, images are neither.
    """
    x = x.float()
    x = x / x.square().mean((1, 2, 3), keepdim=True).clamp(min=1e-12).sqrt()
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    features = [torch.quantile(x.flatten(2), levels, dim=2).permute(1, 2, 0).flatten(1)]
    for _ in range(3):
        height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
        if min(height, width) < 2:
            break
        x = x[..., :height, :width]
        # One Haar step on squares of 2 x 2 pixels, a b over c d: three details and a mean.
        a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], 2).flatten(2) / 2
        magnitude = details.abs()
        rms = details.square().mean(2).clamp(min=1e-8).sqrt()  # [B, C]
        features += [rms.log(), magnitude.mean(2) / rms, magnitude.median(2).values / rms]
        x = (a + b + c + d) / 2
    return torch.cat(features, 1)


@dataclass(frozen=True)
class NoiseLevelEstimator:
    """t from x_t alone: ridge regression on random Fourier features (Rahimi & Recht 2007).

    Calibrated on latents with noise of known t. Its estimate for latents unlike these is a guess,
    so it can also tell how far latents are from them: :meth:`outside`.

    Attributes:
        mean, scale: fp32 [F], mean and deviation of the features.
        frequencies: fp32 [F, M], phases: fp32 [M].
        weights: fp32 [M + F + 1].
        centres: fp32 [K, F], standardised features per bin of t; spreads: fp32 [K, F].
        limits: fp32 [K], 99 % of calibration latents are closer to the centre of their bin.
        errors: fp32 [K], mean absolute error of t per bin, on latents that were not fitted.
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
        """Mask of latents that are farther from the calibration latents of their t than 99 % of
        these are: bool [B]. Their estimate is not calibrated."""
        features = self._standardised(x)
        bins = _bins(self(x))
        return self._distance(features, bins) > self.limits[bins]

    @property
    def error(self) -> float:
        """Mean absolute error of t on latents that were not fitted, for uniform t."""
        return float(self.errors.mean())

    def on(self, device: torch.device) -> "NoiseLevelEstimator":
        """A copy on a device, cached; itself where it is there already."""
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
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file does not hold an estimator.
        """
        try:
            return cls(**load_tensors(path))
        except (InputError, TypeError, OSError) as error:
            raise InputError(
                f"{path} is not a calibrated clock ({error}): remove it, and it is made again"
            ) from error

    @classmethod
    def _tensors(cls) -> list[Field]:
        return [each for each in fields(cls) if each.init]

    def _standardised(self, x: Tensor) -> Tensor:
        features = noise_features(x)
        if features.shape[1] != len(self.mean):
            raise InputError(
                f"latents {list(x.shape[1:])} have {features.shape[1]} features, but this clock "
                f"was calibrated on latents with {len(self.mean)}: calibrate it on these latents"
            )
        return (features - self.mean) / self.scale

    def _lift(self, features: Tensor) -> Tensor:
        ones = torch.ones_like(features[:, :1])
        waves = torch.cos(features @ self.frequencies + self.phases)
        return torch.cat([waves, features, ones], 1)  # [B, M + F + 1]

    def _distance(self, features: Tensor, bins: Tensor) -> Tensor:
        distance = (features - self.centres[bins]) / self.spreads[bins]
        return distance.square().mean(1).sqrt()


def calibrate(latents: Tensor, *, seed: int = 0) -> NoiseLevelEstimator:
    """Fit an estimator to latents [B, C, h, w]: four fifths are fitted, the rest measure its error.

    Raises:
        InputError: too few latents to split and bin.
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
    features = noise_features(fitted)
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
    distances = draft._distance(draft._standardised(fresh), bins)
    wrong = (draft(fresh) - t_fresh).abs()
    masks = [bins == number for number in range(NUM_BINS)]
    limits = torch.stack([torch.quantile(distances[mask], QUANTILE) for mask in masks])
    errors = torch.stack([wrong[mask].mean() for mask in masks])
    return replace(draft, limits=limits, errors=errors)


def _noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents with noise of several t each, evenly spread: [DRAWS * B, C, h, w], [DRAWS * B]."""
    x0 = latents.repeat(DRAWS, 1, 1, 1)
    num = len(x0)
    t = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    t = t[torch.randperm(num, generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    level = t.reshape(-1, 1, 1, 1)
    return (1 - level) * x0 + level * noise, t


def _bins(t: Tensor) -> Tensor:
    return (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
