import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from semroute.schemas import FlowConfig, InputError, parse
from semroute.schemas.train import MAX_MODE_SCALE
from semroute.trainer.diffusion.flow import Flow

shifts = st.floats(0.1, 20)
PREDICTIONS = ["velocity", "x0"]
WITHIN = {"rtol": 0, "atol": 0.02}


def batch(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(size, 3, 4, 4, generator=generator)
    noise = torch.randn(size, 3, 4, 4, generator=generator)
    t = torch.rand(size, generator=generator) * 0.9 + 0.05
    return x0, noise, t


def exact(flow, x0, noise):
    return noise - x0 if flow.prediction == "velocity" else x0


class TestWarp:
    @given(shifts)
    def test_keeps_the_ends_and_the_order(self, shift):
        t = Flow(shift=shift).warp(torch.linspace(0, 1, 101, dtype=torch.float64))
        assert t[0] == 0
        assert t[-1] == 1
        assert (t.diff() > 0).all()

    @given(shifts)
    def test_the_inverse_shift_undoes_it(self, shift):
        t = torch.linspace(0, 1, 11, dtype=torch.float64)
        back = Flow(shift=1 / shift).warp(Flow(shift=shift).warp(t))
        torch.testing.assert_close(back, t)

    def test_shift_one_changes_nothing(self):
        t = torch.linspace(0, 1, 11)
        assert torch.equal(Flow().warp(t), t)


class TestSampleT:
    def test_has_the_quantiles_of_the_shifted_logit_normal(self):
        t = Flow(shift=6.0).sample_t(20_000, torch.Generator().manual_seed(0))
        found = torch.quantile(t, torch.tensor([0.05, 0.5, 0.95]))
        torch.testing.assert_close(found, torch.tensor([0.54, 0.857, 0.97]), rtol=0, atol=0.01)

    def test_mean_and_std_are_of_the_logit(self):
        t = Flow(t_mean=0.8, t_std=0.5).sample_t(20_000, torch.Generator().manual_seed(0))
        logit = torch.logit(t)
        assert float(logit.mean()) == pytest.approx(0.8, abs=0.02)
        assert float(logit.std()) == pytest.approx(0.5, abs=0.02)

    def test_is_a_function_of_the_generator(self):
        first = Flow().sample_t(8, torch.Generator().manual_seed(3))
        assert torch.equal(first, Flow().sample_t(8, torch.Generator().manual_seed(3)))
        assert not torch.equal(first, Flow().sample_t(8, torch.Generator().manual_seed(4)))


# Densities of t before the shift, from arXiv 2403.03206, section 3.1; that of mode by its map.
DENSITIES = {
    "uniform": lambda t: 1,
    "cosine": lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t)),
    "logit-normal": lambda t: (
        math.exp(-((math.log(t / (1 - t)) - 0.3) ** 2) / (2 * 0.7**2))
        / (0.7 * math.sqrt(2 * math.pi) * t * (1 - t))
    ),
}


class TestDensity:
    @pytest.mark.parametrize("density", DENSITIES)
    def test_shares_are_the_integral_of_the_papers_density(self, density):
        own = {"t_mean": 0.3, "t_std": 0.7} if density == "logit-normal" else {}
        t = Flow(t_density=density, **own).place_t(torch.linspace(0, 1, 20_001)[:-1])
        edges = np.linspace(1e-4, 1 - 1e-4, 9)
        for low, high in itertools.pairwise(edges):
            share, _ = integrate.quad(DENSITIES[density], low, high)
            found = ((t >= low) & (t < high)).double().mean()
            assert float(found) == pytest.approx(share, abs=1e-3)

    @pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, MAX_MODE_SCALE])
    def test_mode_is_a_monotone_map_onto_all_of_t(self, scale):
        t = Flow(t_density="mode", mode_scale=scale).place_t(torch.linspace(0, 1, 1001))
        assert (t[0], t[-1]) == (1, 0)
        assert (t.diff() <= 0).all()
        middle = ((t > 0.4) & (t < 0.6)).double().mean()
        assert np.sign(float(middle) - 0.2) == np.sign(scale) or abs(float(middle) - 0.2) < 2e-3

    @pytest.mark.parametrize("density", ["logit-normal", "uniform", "mode", "cosine"])
    def test_both_ways_to_draw_have_the_same_quantiles_and_the_shift(self, density):
        flow = Flow(t_density=density, shift=3.0)
        drawn = flow.sample_t(20_000, torch.Generator().manual_seed(0))
        placed = flow.place_t(torch.rand(20_000, generator=torch.Generator().manual_seed(1)))
        levels = torch.tensor([0.1, 0.5, 0.9])
        torch.testing.assert_close(drawn.quantile(levels), placed.quantile(levels), **WITHIN)
        assert placed.dtype == drawn.dtype == torch.float32

    def test_the_shift_of_a_shape_is_that_of_its_area(self):
        flow = Flow(shift=2.0, shift_area=16 * 16)
        assert flow.at((4, 16, 16)).shift == 2.0
        assert flow.at((4, 32, 32)).shift == 4.0
        assert flow.at((4, 8, 32)).shift == 2.0
        # t n and t m hide as much (arXiv 2403.03206, equation 23).
        m, n = 32 * 32, 16 * 16
        t_n = torch.linspace(0.1, 0.9, 5)
        t_m = Flow(shift=math.sqrt(m / n)).warp(t_n)
        torch.testing.assert_close(t_m / (1 - t_m), math.sqrt(m / n) * t_n / (1 - t_n))
        assert Flow(shift=2.0).at((4, 32, 32)).shift == 2.0

    @pytest.mark.parametrize(
        "changes",
        [{"t_mean": 1.0, "t_density": "cosine"}, {"mode_scale": 1.0}, {"min_snr_gamma": 2.0}],
    )
    def test_a_key_without_effect_is_refused(self, changes):
        with pytest.raises(InputError, match="does not use"):
            parse(FlowConfig, changes, "test")


class TestWeight:
    def test_none_is_no_weight(self):
        assert Flow().weight(torch.rand(3)) is None

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_min_snr_weighs_the_error_of_x0(self, prediction):
        flow = Flow(prediction, loss_weight="min-snr", min_snr_gamma=5.0)
        x0, noise, _ = batch()
        t = torch.tensor([0.0, 0.05, 0.25, 0.4, 0.9, 1.0])
        x_t = flow.interpolate(x0, noise, t)
        wrong = exact(flow, x0, noise) + 0.1
        found = flow.loss(wrong, x0, noise, t) * flow.weight(t)
        guess = wrong if prediction == "x0" else x_t - t[:, None, None, None] * wrong
        error = (guess - x0).square().flatten(1).mean(1)
        snr = ((1 - t) / t).square().clamp(max=5.0)
        torch.testing.assert_close(found, snr * error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
class TestPath:
    def test_runs_from_data_to_noise(self, prediction):
        flow = Flow(prediction)
        x0, noise, t = batch()
        assert torch.equal(flow.interpolate(x0, noise, torch.zeros_like(t)), x0)
        assert torch.equal(flow.interpolate(x0, noise, torch.ones_like(t)), noise)

    def test_the_exact_prediction_gives_the_velocity_which_leads_back_to_the_data(self, prediction):
        flow = Flow(prediction)
        x0, noise, t = batch()
        x_t = flow.interpolate(x0, noise, t)
        right = exact(flow, x0, noise)
        velocity = flow.to_velocity(right, x_t, t)
        torch.testing.assert_close(velocity, noise - x0, rtol=1e-4, atol=1e-4)
        data = x_t - t[:, None, None, None] * velocity
        torch.testing.assert_close(data, x0, rtol=1e-4, atol=1e-4)

    def test_the_exact_prediction_has_no_loss(self, prediction):
        flow = Flow(prediction)
        x0, noise, t = batch()
        assert not flow.loss(exact(flow, x0, noise), x0, noise, t).any()

    def test_loss_is_per_sample(self, prediction):
        flow = Flow(prediction)
        x0, noise, t = batch()
        guess = torch.zeros_like(x0)
        together = flow.loss(guess, x0, noise, t)
        alone = [flow.loss(guess[i, None], x0[i, None], noise[i, None], t[i, None]) for i in (0, 5)]
        torch.testing.assert_close(together[[0, 5]], torch.cat(alone))


class TestLoss:
    def test_of_x0_is_the_velocity_loss_above_the_floor_of_t(self):
        x0, noise, _ = batch()
        t = torch.tensor([0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
        x_t = Flow().interpolate(x0, noise, t)
        guess = torch.full_like(x0, 0.3)
        velocity = Flow("x0").to_velocity(guess, x_t, t)
        torch.testing.assert_close(
            Flow("x0").loss(guess, x0, noise, t),
            Flow("velocity").loss(velocity, x0, noise, t),
            rtol=1e-4,
            atol=1e-4,
        )

    def test_of_x0_is_bounded_near_data(self):
        x0, noise, _ = batch()
        loss = Flow("x0").loss(x0 + 1, x0, noise, torch.full((6,), 1e-6))
        torch.testing.assert_close(loss, torch.full((6,), 25.0), rtol=1e-3, atol=0)

    def test_is_fp32_whatever_the_prediction(self):
        x0, noise, t = batch()
        assert Flow().loss(torch.zeros_like(x0).bfloat16(), x0, noise, t).dtype == torch.float32


class TestSchedule:
    @given(shifts, st.integers(1, 100))
    def test_falls_from_one_to_zero(self, shift, num_steps):
        t = Flow(shift=shift).schedule(num_steps)
        assert len(t) == num_steps + 1
        assert t[0] == 1
        assert t[-1] == 0
        assert (t.diff() < 0).all()

    def test_no_steps_is_refused(self):
        with pytest.raises(ValueError, match="num_steps is 0; a schedule needs at least 1"):
            Flow().schedule(0)


def test_configuration_is_taken_over():
    config = FlowConfig(prediction="x0", t_mean=0.8, t_std=0.9, shift=2.0)
    assert Flow.from_config(config) == Flow("x0", 0.8, 0.9, 2.0)
