import functools

import numpy as np
import pyarrow as pa
import pytest
import torch

from semroute.trainer.diffusion.flow import Flow
from semroute.trainer.diffusion.noise_level import calibrate
from semroute.trainer.diffusion.sampling import SamplingConfig, solve
from semroute.trainer.evaluation.lag import (
    LAG_SCHEMA,
    TrajectoryMismatch,
    TrajectoryProbe,
    best_shift,
    lag_figure,
)

NUM_STEPS = 10


def bars(num):
    """Images of a bar of random position and colour on a dark ground."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((num, 3, 32, 32), -0.8)
    starts = torch.randint(0, 16, (num,), generator=generator).tolist()
    for image, start, colour in zip(
        images, starts, torch.rand(num, 3, generator=generator), strict=True
    ):
        image[:, start : start + 8] = colour[:, None, None]
    return images


class StraightModel:
    """Goes straight to its image, but leaves ``excess`` times as much noise in x on the way."""

    def __init__(self, images, excess):
        self.images = images
        self.excess = excess

    def denoise(self, x_t, t, text):
        # From x = (1 - t) x_0 + f(t) n with f(t) = t (1 + excess (1 - t)): dx/dt.
        t = t.reshape(-1, 1, 1, 1)
        noise = (x_t - (1 - t) * self.images) / (t * (1 + self.excess * (1 - t)))
        return -self.images + noise * (1 + self.excess * (1 - 2 * t))


IMAGES = bars(400)


@functools.cache
def estimator():
    return calibrate(IMAGES)


def read(excess, num=64, num_steps=NUM_STEPS):
    probe = TrajectoryProbe(estimator(), num_steps, seed=0)
    noise = torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    sampling = SamplingConfig(num_steps, cfg_scale=1.0)
    model = StraightModel(IMAGES[:num], excess)
    solve(model, Flow("velocity"), lambda t: t, None, noise, sampling, probe)
    rows = [{"cfg_scale": 1.0, "method": "euler", **row} for row in probe.rows()]
    return TrajectoryMismatch(pa.Table.from_pylist(rows, schema=LAG_SCHEMA), 0.01)


class TestLag:
    def test_exact_trajectories_have_none(self):
        lag = read(0.0)
        part = lag.of(1.0, "euler")
        assert len(part["t"]) == NUM_STEPS - 1
        (row,) = lag.summary()
        assert row["lag"] == pytest.approx(0.0, abs=0.01)
        assert row["shift"] == pytest.approx(1.0, abs=0.05)

    def test_noisier_trajectories_are_noticed(self):
        lag = read(0.5, num_steps=20)
        part = lag.of(1.0, "euler")
        t = part["t"]
        noise = t * (1 + 0.5 * (1 - t))
        expected = noise / (1 - t + noise) - t
        inside = (t > 0.15) & (t < 0.85)
        found = part["estimate_mean"] - part["estimate_control"]
        assert np.abs(found - expected)[inside].max() < 0.025
        (row,) = lag.summary()
        assert row["lag"] > 0.03
        assert row["shift"] > 1.1
        assert "+0.0" in lag.to_text()

    def test_the_figure_has_a_line_per_guidance_scale(self):
        figure = lag_figure(read(0.0), "exact")
        labels = [line.get_label() for line in figure.axes[0].lines]
        assert [each for each in labels if each.startswith("guidance")] == ["guidance 1"]


class Gaussian:
    """Exact velocity for data N(m, S), where S is diagonal in frequencies, of power f^-p.

    x_t is N((1 - t) m, C) with C = (1 - t)^2 S + t^2, and dx/dt = -m + (t - (1 - t) S) / C
    (x - (1 - t) m). This is affine in m, so guidance by w towards N(m, S), away from N(0, S), is
    the same with w m: its latents have their nominal noise level at every t, too.
    """

    SHAPE = (3, 16, 16)

    def __init__(self, power, mean=None):
        frequency = torch.fft.fftfreq(16, dtype=torch.float64) * 16
        radius = (frequency[:, None] ** 2 + frequency**2).sqrt().clamp(min=1.0)
        spectrum = radius**-power
        self.spectrum = spectrum / spectrum.mean()
        self.mean = torch.zeros(self.SHAPE) if mean is None else mean

    def filter(self, x, by):
        return torch.fft.ifft2(torch.fft.fft2(x.double()) * by).real

    def draw(self, num, seed):
        noise = torch.randn(num, *self.SHAPE, generator=torch.Generator().manual_seed(seed))
        return (self.mean + self.filter(noise, self.spectrum.sqrt())).float()

    def denoise(self, x_t, t, text):
        now, mean = float(t[0]), self.mean * (text is not None)
        gain = (now - (1 - now) * self.spectrum) / ((1 - now) ** 2 * self.spectrum + now**2)
        return (self.filter(x_t - (1 - now) * mean, gain) - mean).float()


def blob(strength):
    """A mean image: bright in the middle."""
    place = torch.linspace(-1, 1, 16)
    return strength * torch.exp(-2 * (place[:, None] ** 2 + place**2)).expand(Gaussian.SHAPE)


@functools.cache
def calibrated(power, cfg_scale):
    """On images as they are sampled with that guidance."""
    return calibrate(Gaussian(power, cfg_scale * blob(0.3)).draw(600, seed=0))


class TestGaussian:
    """Exact trajectories of Gaussian data have no lag, whatever their spectrum."""

    @pytest.mark.parametrize("method", ["euler", "heun"])
    @pytest.mark.parametrize(
        ("power", "cfg_scale"), [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (2.0, 4.0)]
    )
    def test_has_none(self, power, cfg_scale, method):
        model = Gaussian(power, blob(0.3))
        clock = calibrated(power, cfg_scale)
        num_steps = 40 if method == "euler" else 20
        probe = TrajectoryProbe(clock, num_steps, seed=0)
        noise = torch.randn(64, *Gaussian.SHAPE, generator=torch.Generator().manual_seed(3))
        sampling = SamplingConfig(num_steps, cfg_scale=cfg_scale, method=method)
        null = (lambda t: None) if cfg_scale != 1.0 else None
        solve(model, Flow("velocity"), lambda t: "text", null, noise, sampling, probe)
        rows = [{"cfg_scale": cfg_scale, "method": method, **row} for row in probe.rows()]
        lag = TrajectoryMismatch(pa.Table.from_pylist(rows, schema=LAG_SCHEMA), clock.error)
        (row,) = lag.summary()
        assert row["lag"] == pytest.approx(0.0, abs=0.012)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_the_best_shift_is_the_one_that_made_the_lag(shift):
    t = np.linspace(0.1, 0.9, 9)
    effective = shift * t / (1 + (shift - 1) * t)
    assert best_shift(t, effective - t) == pytest.approx(shift, rel=0.02)
