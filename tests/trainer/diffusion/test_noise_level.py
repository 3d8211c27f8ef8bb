import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semroute.schemas import InputError
from semroute.trainer.diffusion.noise_level import (
    NoiseLevelEstimator,
    calibrate,
    shifted,
)
from semroute.trainer.runs.noise_level import CLOCK, make_clock, open_estimator


def images(num, size=16, seed=0):
    """Bright boxes on a dark ground: images that are not noise."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.full((num, 3, size, size), -0.8)
    corners = torch.randint(0, size // 2, (num, 2), generator=generator).tolist()
    colours = torch.rand(num, 3, generator=generator)
    for image, (top, left), colour in zip(boxes, corners, colours, strict=True):
        image[:, top : top + size // 3, left : left + size // 3] = colour[:, None, None]
    return boxes


def noised(images, t, seed=1):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (1 - t) * images + t * noise


@pytest.fixture(scope="module")
def estimator():
    return calibrate(images(1000))


class TestEstimator:
    @pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.95])
    def test_reads_new_images_within_its_stated_error(self, estimator, t):
        read = estimator(noised(images(400, seed=5), t))
        own = float(estimator.errors[int(t * 20)])
        assert (read - t).abs().mean() < 1.5 * own + 0.005
        assert own < 0.06

    def test_says_which_latents_it_does_not_know(self, estimator):
        fresh = noised(images(400, seed=5), 0.3)
        assert estimator.outside(fresh).float().mean() < 0.05
        stripes = torch.sign(torch.sin(torch.arange(16.0)))[:, None].expand(400, 3, 16, 16)
        assert estimator.outside(noised(3 * stripes, 0.3)).float().mean() > 0.9

    def test_a_common_factor_changes_nothing(self, estimator):
        x = noised(images(8), 0.5)
        torch.testing.assert_close(estimator(3 * x), estimator(x), rtol=1e-3, atol=1e-3)

    def test_is_a_function_of_its_latents(self, estimator):
        again = calibrate(images(1000))
        x = noised(images(8), 0.5)
        assert torch.equal(again(x), estimator(x))

    def test_is_written_and_read(self, estimator, tmp_path):
        estimator.save(tmp_path / CLOCK)
        x = noised(images(8), 0.5)
        assert torch.equal(NoiseLevelEstimator.load(tmp_path / CLOCK)(x), estimator(x))
        assert NoiseLevelEstimator.load(tmp_path / CLOCK).error == estimator.error

    def test_refuses_latents_of_another_shape(self, estimator):
        with pytest.raises(InputError, match="this clock was calibrated on latents with 54"):
            estimator(torch.zeros(2, 4, 16, 16))

    def test_refuses_too_few_latents(self):
        with pytest.raises(InputError, match="found 49 latents to calibrate a clock on"):
            calibrate(images(49))

    def test_refuses_another_file(self, tmp_path):
        (tmp_path / CLOCK).write_bytes(b"nonsense")
        with pytest.raises(InputError, match="is not a calibrated clock"):
            open_estimator(tmp_path, "nowhere")


class TestMakeClock:
    def test_names(self, estimator, tmp_path):
        estimator.save(tmp_path / CLOCK)
        x, t = noised(images(4), 0.5), torch.full((4,), 0.5)
        assert make_clock("nominal", tmp_path, "nowhere") is None
        assert torch.equal(make_clock("shift:0.5", tmp_path, "nowhere")(x, t), shifted(t, 0.5))
        assert torch.equal(make_clock("estimated", tmp_path, "nowhere")(x, t), estimator(x))

    @pytest.mark.parametrize("name", ["sundial", "shift", "shift:x", "shift:0", "shift:inf"])
    def test_refuses_others(self, name, tmp_path):
        with pytest.raises(InputError, match="expected nominal, estimated, or shift:K"):
            make_clock(name, tmp_path, "nowhere")


@given(t=st.floats(0, 1), shift=st.floats(0.1, 10))
@settings(max_examples=50)
def test_a_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, shift):
    moved = shifted(torch.tensor([0.0, t, 1.0], dtype=torch.float64), shift)
    assert (moved[0], moved[2]) == (0.0, pytest.approx(1.0))
    assert shifted(moved, 1 / shift)[1].item() == pytest.approx(t, abs=1e-9)
