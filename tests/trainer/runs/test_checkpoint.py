import json
import pickle

import pytest
import torch

from semroute.schemas import CheckpointState, WindowState
from semroute.trainer.runs.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    remove_leftovers,
    remove_old,
    save_checkpoint,
)
from semroute.trainer.runs.metrics import METRICS_SCHEMA, read_metrics, trim_metrics
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.train import train

WINDOW = WindowState(losses=[0.1], norms=[2.0])
FILES = [
    "checksums.json",
    "ema.safetensors",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
]


@pytest.fixture(scope="module")
def run_path(configure, tmp_path_factory):
    """A finished run of strategy depth with checkpoints of steps 2 and 4; read only."""
    folder = tmp_path_factory.mktemp("runs")
    return train(configure(folder / "depth", log_every=2, checkpoint_every=2, model={"depth": 3}))


def save(path, step, value=0.0):
    tensors = {"a": torch.full((2, 2), value)}
    state = CheckpointState(step=step, window=WINDOW, num_ranks=1)
    return save_checkpoint(path, state, model=tensors, ema=tensors, optimizer=tensors)


class TestSaveCheckpoint:
    def test_what_was_saved_is_read_back(self, tmp_path):
        save(tmp_path, 3, value=0.3)
        found = latest_checkpoint(tmp_path)
        assert found.step == 3
        assert found.path.name == "step-00000003"
        for tensors in (found.model(), found.ema(), found.optimizer()):
            assert torch.equal(tensors["a"], torch.full((2, 2), 0.3))
        assert found.state() == CheckpointState(step=3, window=WINDOW, num_ranks=1)

    def test_older_ones_go(self, tmp_path):
        for step in (10, 20, 100, 110):
            save(tmp_path, step)
        remove_old(tmp_path, keep=2)
        assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [100, 110]

    def test_half_a_checkpoint_is_none(self, tmp_path):
        save(tmp_path, 1)
        killed = tmp_path / "checkpoints" / "step-00000002.tmp"
        killed.mkdir()
        (killed / "model.safetensors").write_bytes(b"half")
        assert latest_checkpoint(tmp_path).step == 1
        remove_leftovers(tmp_path)
        save(tmp_path, 2)
        assert latest_checkpoint(tmp_path).step == 2
        assert not killed.exists()

    def test_a_directory_without_checkpoints_has_no_latest(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None


class TestOptimizerTensors:
    @pytest.mark.parametrize("kind", ["adamw", "muon"])
    def test_a_restored_optimizer_takes_the_same_step(self, kind, tmp_path):
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
        state = CheckpointState(step=1, num_ranks=1)
        tensors = optimizer_tensors(model, optimizers)
        saved = save_checkpoint(tmp_path, state, model={}, ema={}, optimizer=tensors)
        other, others = make()
        other.load_state_dict(model.state_dict())
        load_optimizer_tensors(other, others, saved.open("optimizer"))
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
            "routing.jsonl",
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
