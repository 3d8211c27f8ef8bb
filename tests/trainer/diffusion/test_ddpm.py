from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from semroute.schemas import InputError  # noqa: E402
from semroute.trainer.diffusion.ddpm import Ddpm  # noqa: E402

SCHEDULERS: dict[str, dict[str, Any]] = {
    "pixart": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "stable diffusion": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}


@pytest.fixture(params=SCHEDULERS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SCHEDULERS[request.param]


def test_adds_noise_as_the_scheduler_does(config: dict[str, Any]) -> None:
    path, scheduler = Ddpm.from_scheduler(config), diffusers.DDPMScheduler(**config)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 1, 250, 500, 999])
    found = path.interpolate(x0, noise, (steps + 1) / 1000)
    torch.testing.assert_close(found, scheduler.add_noise(x0, noise, steps), rtol=1e-6, atol=1e-6)
    assert torch.equal(path.interpolate(x0, noise, torch.zeros(5)), x0)


def test_draws_each_step_that_the_scheduler_has(config: dict[str, Any]) -> None:
    t = Ddpm.from_scheduler(config).sample_t(100_000, torch.Generator().manual_seed(0))
    steps = t * 1000 - 1
    assert torch.equal(steps.round().unique(), torch.arange(1000.0))
    assert (steps - steps.round()).abs().max() < 1e-3
    assert t.mean() == pytest.approx(0.5005, abs=0.005)


@pytest.mark.parametrize("num_steps", [4, 10, 250])
def test_samples_as_ddim_does(config: dict[str, Any], num_steps: int) -> None:
    """Steps of equal length down to the data, for a network that knows the noise but for a bias."""
    path = Ddpm.from_scheduler(config)
    options = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    scheduler = diffusers.DDIMScheduler(**config, **options)
    scheduler.set_timesteps(num_steps)
    schedule = path.schedule(num_steps)
    assert scheduler.timesteps.tolist() == [round(1000 * t) - 1 for t in schedule[:-1].tolist()]
    found = expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, now, after in zip(scheduler.timesteps, schedule[:-1], schedule[1:], strict=True):
        found = path.advance(found, found.sin() + 0.1, float(now), float(after))
        expected = scheduler.step(expected.sin() + 0.1, step, expected).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_noise_is_the_target(config: dict[str, Any]) -> None:
    path = Ddpm.from_scheduler(config)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.001, 0.5, 1.0])
    assert path.loss(noise, x0, noise, t).tolist() == [0, 0, 0]
    shifted = path.loss(noise.bfloat16() + 2, x0, noise, t)
    assert shifted.dtype == torch.float32
    torch.testing.assert_close(shifted, torch.full((3,), 4.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("found", ["v_prediction", "sample"])
def test_a_network_that_predicts_something_else_is_refused(found: str) -> None:
    with pytest.raises(InputError, match=f"prediction_type is {found}, expected epsilon"):
        Ddpm.from_scheduler({"prediction_type": found})
    with pytest.raises(InputError, match="prediction_type is None, expected epsilon"):
        Ddpm.from_scheduler({})


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_it_has_a_thousand_steps(config: dict[str, Any], num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; expected 1 to 1000"):
        Ddpm.from_scheduler(config).schedule(num_steps)


def test_uniform_numbers_become_each_step_as_often(config: dict[str, Any]) -> None:
    steps = Ddpm.from_scheduler(config).place_t((torch.arange(3000) + 0.5) / 3000) * 1000 - 1
    assert torch.equal(steps.round(), torch.arange(1000.0).repeat_interleave(3))


def test_min_snr_weighs_the_error_of_x0(config: dict[str, Any]) -> None:
    path = Ddpm.from_scheduler(config, min_snr_gamma=5.0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 100, 250, 500, 900]) / 1000
    found = path.loss(noise + 0.1, x0, noise, t) * path.weight(t)
    kept = path.kept[(t * 1000).round().long()]
    snr = kept / (1 - kept)
    error = 0.1**2 * (1 - kept) / kept  # of x0, where the noise is wrong by 0.1
    torch.testing.assert_close(found, snr.clamp(max=5.0) * error, rtol=1e-4, atol=0)
    assert Ddpm.from_scheduler(config).weight(t) is None
