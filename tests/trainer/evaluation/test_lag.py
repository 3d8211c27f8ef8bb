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
        assert row["oracle"] == pytest.approx(0.0, abs=0.01)
        assert row["estimate"] == pytest.approx(0.0, abs=0.01)
        assert row["shift"] == pytest.approx(1.0, abs=0.05)

    def test_noisier_trajectories_are_noticed_by_both_clocks(self):
        lag = read(0.5, num_steps=20)
        part = lag.of(1.0, "euler")
        t = part["t"]
        noise = t * (1 + 0.5 * (1 - t))
        expected = noise / (1 - t + noise) - t
        inside = (t > 0.15) & (t < 0.85)
        for clock in ("oracle", "estimate"):
            found = part[f"{clock}_mean"] - part[f"{clock}_control"]
            assert np.abs(found - expected)[inside].max() < 0.025
        (row,) = lag.summary()
        assert row["oracle"] > 0.03
        assert row["shift"] > 1.1
        assert "+0.0" in lag.to_text()

    def test_the_figure_has_a_line_a_clock(self):
        figure = lag_figure(read(0.0), "exact")
        labels = [line.get_label() for line in figure.axes[0].lines]
        assert [each for each in labels if each.startswith("guidance")] == [
            "guidance 1, oracle",
            "guidance 1, estimate",
        ]


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0])
def test_the_best_shift_is_the_one_that_made_the_lag(shift):
    t = np.linspace(0.1, 0.9, 9)
    effective = shift * t / (1 + (shift - 1) * t)
    assert best_shift(t, effective - t) == pytest.approx(shift, rel=0.02)
