import html
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from semroute.schemas import ContractError, InputError, TrainConfig
from semroute.trainer.checkpoint import (
    METRICS_SCHEMA,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    load_run,
    optimizer_tensors,
    read_metrics,
    save_checkpoint,
    trim_metrics,
)
from semroute.trainer.loop import train
from semroute.trainer.sampling import sample

FILES = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture(scope="module")
def configure(feature_store, latent_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def configure(strategy, **changes):
        return TrainConfig.model_validate(
            {
                "features": str(feature_store),
                "latents": str(latent_store),
                "output": str(folder / strategy),
                "steps": 4,
                "log_every": 2,
                "checkpoint_every": 2,
                "mixed_precision": "no",
                "routing": {"strategy": strategy},
                "model": {"size": "nano", "depth": 3, "patch_size": 4},
                "data": {"batch_size": 4},
                "ema": {"every": 1},
                **changes,
            }
        )

    return configure


@pytest.fixture(scope="module")
def run_path(configure):
    """A finished run of strategy depth with checkpoints of steps 2 and 4; read only."""
    return train(configure("depth"))


def save(path, step, keep=3, value=0.0):
    tensors = {"a": torch.full((2, 2), value)}
    return save_checkpoint(
        path, step, model=tensors, ema=tensors, optimizer=tensors, state={"x": 0.1}, keep=keep
    )


class TestSaveCheckpoint:
    def test_what_was_saved_is_read_back(self, tmp_path):
        save(tmp_path, 3, value=0.3)
        found = latest_checkpoint(tmp_path)
        assert found.step == 3
        assert found.path.name == "step-00000003"
        for tensors in (found.model(), found.ema(), found.optimizer()):
            assert torch.equal(tensors["a"], torch.full((2, 2), 0.3))
        assert found.state() == {"x": 0.1, "step": 3}

    def test_older_ones_go_when_the_new_one_is_there(self, tmp_path):
        for step in (10, 20, 100, 110):
            save(tmp_path, step, keep=2)
        assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [100, 110]

    def test_half_a_checkpoint_is_none(self, tmp_path):
        save(tmp_path, 1)
        killed = tmp_path / "checkpoints" / "step-00000002.tmp"
        killed.mkdir()
        (killed / "model.safetensors").write_bytes(b"half")
        assert latest_checkpoint(tmp_path).step == 1
        save(tmp_path, 2)
        assert latest_checkpoint(tmp_path).step == 2
        assert not killed.exists()

    def test_a_failing_save_leaves_the_older_ones(self, tmp_path):
        save(tmp_path, 1, keep=1)
        with pytest.raises(TypeError):
            save_checkpoint(
                tmp_path, 2, model={}, ema={}, optimizer={}, state={"x": object()}, keep=1
            )
        assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]

    def test_a_directory_without_checkpoints_has_no_latest(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None


class TestOptimizerTensors:
    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_a_restored_optimizer_takes_the_same_step(self, kind):
        def make():
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 2))
            if kind == "adamw":
                return model, [torch.optim.AdamW(model.parameters(), lr=0.1)]
            matrix, *rest = model.parameters()
            return model, [torch.optim.AdamW(rest, lr=0.1), torch.optim.Muon([matrix], lr=0.1)]

        def step(model, optimizers):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()

        model, optimizers = make()
        step(model, optimizers)
        saved = {key: value.clone() for key, value in optimizer_tensors(model, optimizers).items()}
        other, others = make()
        other.load_state_dict(model.state_dict())
        load_optimizer_tensors(other, others, saved)
        step(model, optimizers)
        step(other, others)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)

    def test_names_are_the_parameters(self):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert set(optimizer_tensors(model, [optimizer])) == {
            f"{name}/{key}"
            for name in ("weight", "bias")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }


class TestRunDirectory:
    def test_holds_what_the_documentation_lists(self, run_path):
        assert sorted(p.name for p in run_path.iterdir()) == [
            "checkpoints",
            "metrics.jsonl",
            "run.json",
        ]
        for checkpoint in list_checkpoints(run_path):
            assert sorted(p.name for p in checkpoint.path.iterdir()) == FILES

    def test_nothing_is_pickled(self, run_path):
        for file in (p for p in run_path.rglob("*") if p.is_file()):
            with pytest.raises(Exception):  # noqa: B017, PT011
                pickle.loads(file.read_bytes())

    def test_metrics_are_typed(self, run_path):
        table = load_run(run_path).metrics()
        assert table.schema == METRICS_SCHEMA
        assert table["step"].to_pylist() == [2, 4]

    def test_metrics_of_a_run_without_lines_are_an_empty_table(self, run_path, tmp_path):
        assert read_metrics(tmp_path) == []

    def test_trimming_takes_back_lines_after_a_step(self, tmp_path):
        lines = [{"step": 2}, {"step": 4}, {"step": 6}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text + '{"step": 8, "lo')
        assert read_metrics(tmp_path) == lines
        trim_metrics(tmp_path, 4)
        assert read_metrics(tmp_path) == lines[:2]


class TestLoadRun:
    def test_gives_a_model_that_samples(self, run_path):
        run = load_run(run_path)
        assert run.step == 4
        hidden = torch.randn(3, 4, 32)
        out = sample(run.model, run.flow, hidden, torch.tensor([0, 3]), num_steps=2, cfg_scale=1.0)
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
