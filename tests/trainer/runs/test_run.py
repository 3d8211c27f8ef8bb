import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from semroute.schemas import ContractError, InputError
from semroute.trainer.diffusion.sampling import SamplingConfig, sample
from semroute.trainer.runs.checkpoint import latest_checkpoint
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.train import train


@pytest.fixture(scope="module")
def configure(configure, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    usual = {"log_every": 2, "checkpoint_every": 2, "model": {"depth": 3}, "ema": {"every": 1}}
    return lambda strategy: configure(folder / strategy, routing={"strategy": strategy}, **usual)


@pytest.fixture(scope="module")
def run_path(configure):
    """A finished run of strategy depth with checkpoints of steps 2 and 4; read only."""
    return train(configure("depth"))


class TestLoadRun:
    def test_gives_a_model_that_samples(self, run_path):
        run = load_run(run_path)
        assert run.step == 4
        hidden = torch.randn(3, 4, 32)
        config = SamplingConfig(2, 1.0)
        out = sample(run.model, run.flow, hidden, torch.tensor([0, 3]), config=config)
        assert out.shape == (1, 3, 12, 12)
        assert not any(p.requires_grad for p in run.model.parameters())

    def test_average_and_weights_differ(self, run_path):
        average, last = load_run(run_path), load_run(run_path, weights="model")
        checkpoint = latest_checkpoint(run_path)
        for run, tensors in ((average, checkpoint.ema()), (last, checkpoint.model())):
            for name, value in run.model.state_dict().items():
                assert torch.equal(value, tensors[name])
        assert not np.array_equal(average.weights(), last.weights())

    def test_opens_any_step_that_is_kept(self, run_path):
        assert load_run(run_path, step=2).step == 2
        with pytest.raises(InputError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
            load_run(run_path, step=3)

    @pytest.mark.parametrize("strategy", ["uniform", "depth", "time", "joint"])
    def test_weights_are_alpha_by_level_block_and_layer(self, configure, strategy):
        run = load_run(train(configure(strategy)))
        alpha = run.weights([0.1, 0.5])
        assert alpha.shape == (2, 3, 4)
        assert alpha.dtype == np.float32
        np.testing.assert_allclose(alpha.sum(-1), 1.0, rtol=1e-5)
        assert run.layers == [1, 2, 3, 4]
        changing = strategy in ("time", "joint")
        assert run.weights().shape == (21 if changing else 1, 3, 4)
        assert np.array_equal(alpha[0], alpha[1]) != changing
        alpha[0, 0, 0] = 2.0  # an array of one's own

    @pytest.mark.parametrize("strategy", ["depth", "joint"])
    def test_history_is_alpha_while_it_was_learned(self, configure, strategy):
        run = load_run(train(configure(strategy)), weights="model")
        steps, levels, weights = run.history()
        assert steps.tolist() == [2, 4]
        assert levels == ([1.0] if strategy == "depth" else [0.1, 0.3, 0.5, 0.7, 0.9])
        assert weights.shape == (2, len(levels), 3, 4)
        np.testing.assert_allclose(weights[1], run.weights(levels), atol=1e-6)

    def test_fixed_weights_have_no_history(self, configure):
        steps, _, weights = load_run(train(configure("uniform"))).history()
        assert (len(steps), weights.shape) == (0, (0, 1, 3, 4))

    def test_weights_are_labelled(self, configure):
        pytest.importorskip("xarray")
        run = load_run(train(configure("joint")))
        alpha = run.to_xarray([0.1, 0.5])
        assert alpha.dims == ("block", "layer", "t")
        assert alpha.coords["block"].values.tolist() == [1, 2, 3]
        assert alpha.coords["layer"].values.tolist() == [1, 2, 3, 4]
        expected = run.weights([0.1, 0.5])[1, 2, 3]
        assert alpha.sel(block=3, layer=4, t=0.5).item() == expected
        assert alpha.attrs["strategy"] == "joint"
        assert load_run(run.path).to_xarray().sizes["t"] == 21

    def test_does_not_touch_the_global_generator(self, run_path):
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        load_run(run_path)
        assert torch.equal(torch.rand(1), expected)

    def test_repr_and_html_say_the_same(self, run_path):
        run = load_run(run_path)
        text = repr(run)
        for expected in ("depth", "3 blocks of width 96", "12 of them routing", "4 of 4", "loss"):
            assert expected in text
        cells = re.findall(r"<td[^>]*>(.*?)</td>", run._repr_html_())
        for cell in cells:
            assert html.unescape(cell) in text

    def test_no_run(self, tmp_path):
        with pytest.raises(InputError, match=r"is no run: it has no run.json"):
            load_run(tmp_path)

    def test_no_checkpoint_yet(self, run_path, tmp_path):
        (tmp_path / "run.json").write_text((run_path / "run.json").read_text())
        with pytest.raises(InputError, match="no checkpoint yet: the first is written after 2"):
            load_run(tmp_path)

    def test_a_damaged_record(self, run_path, tmp_path):
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(InputError, match=r"run.json is damaged"):
            load_run(tmp_path)
        (tmp_path / "run.json").write_text('{"format": "semroute.run"}')
        with pytest.raises(ContractError, match=r"run.json is not valid:"):
            load_run(tmp_path)

    def test_unknown_weights(self, run_path):
        with pytest.raises(InputError, match="weights is 'best'; expected 'ema' or 'model'"):
            load_run(run_path, weights="best")

    def test_accepts_a_string(self, run_path):
        assert load_run(str(run_path)).path == Path(run_path)
