from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from semroute.cli import cli
from semroute.schemas import InputError
from semroute.trainer.training.accelerator import make_accelerator
from semroute.trainer.training.dry_run import plan
from semroute.trainer.training.setup import make_loader, prepare
from semroute.trainer.training.train import train
from semroute.trainer.training.trainer import Trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure(configure, tmp_path):
    def changed(strategy="depth", **changes):
        usual = {
            "steps": 100,
            "routing": {"strategy": strategy},
            "model": {"depth": 3},
            "data": {"batch_size": 8, "noise_draws": 2},
        }
        return configure(tmp_path / "run", **usual | changes)

    return changed


def kept_bytes(config):
    """What autograd holds of the first step, of real tensors."""
    setup = prepare(config)
    setup.model.gradient_checkpointing = config.gradient_checkpointing
    trainer = Trainer(config, make_accelerator(config), setup.model, None)
    batch = make_loader(setup).read(0)
    own = {p.untyped_storage().data_ptr() for p in (*setup.model.parameters(), batch.hidden)}
    sizes = {}

    def pack(saved):
        if saved.untyped_storage().data_ptr() not in own:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        _kept = trainer.loss(batch)
    return sum(sizes.values())


class TestPlan:
    def test_counts_what_training_makes(self, configure):
        config = configure("joint", optimizer={"name": "muon"})
        found = plan(config, num_ranks=2, step_seconds=0.5).details
        model = prepare(config).model
        numbers = sum(p.numel() for p in model.parameters())
        matrices = sum(p.numel() for p in model.block_matrices())
        assert found["parameters"]["total"] == numbers
        assert found["parameters"]["routing"] == sum(p.numel() for p in model.router_parameters())
        memory = found["memory_bytes"]
        assert memory["weights"] == memory["average"] == 4 * numbers
        assert memory["gradients"] == 8 * numbers
        assert memory["optimizer"] == 4 * (2 * numbers - matrices)
        assert found["steps"] == {"total": 100, "done": 0, "per_epoch": 25.0}
        assert found["batch"]["samples_at_once"] == 4
        assert found["layers_read"] == [1, 2, 3, 4]
        assert not Path(config.output).exists()

    @pytest.mark.parametrize("strategy", ["penultimate", "depth", "joint"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_activations_are_about_what_autograd_keeps(self, configure, strategy, checkpointing):
        config = configure(strategy, gradient_checkpointing=checkpointing)
        planned = plan(config).details["memory_bytes"]["activations"]
        real = kept_bytes(config)
        if not checkpointing:
            assert planned == pytest.approx(real, rel=0.15)
        assert planned >= real
        assert planned <= plan(configure(strategy)).details["memory_bytes"]["activations"]

    def test_the_store_must_deliver_what_a_step_reads(self, configure, feature_store):
        found = plan(configure(), step_seconds=0.5)
        per_step = found.details["read_bytes_per_step"]
        assert 8 * 20 * 2 * 4 * 32 < per_step < 8 * 60 * 2 * 4 * 32  # captions of 20 to 60 bytes
        one_layer = plan(configure("penultimate")).details["read_bytes_per_step"]
        latents = 8 * 3 * 12 * 12
        assert one_layer - latents == pytest.approx((per_step - latents) / 4, rel=0.05)
        assert "KB/s at 0.5 s per step (given)" in str(found)
        assert "--step-seconds or --measure" in str(plan(configure()))

    def test_measures_and_forgets(self, configure):
        config = configure()
        found = plan(config, measure_steps=1)
        assert found.details["step_seconds"] > 0
        assert "measured here" in str(found)
        assert not Path(config.output).exists()

    def test_knows_what_is_done(self, configure):
        train(configure(steps=2))
        assert plan(configure()).details["steps"]["done"] == 2

    @pytest.mark.parametrize(
        ("changes", "ranks", "message"),
        [
            ({"features": "/nowhere"}, 1, "is no feature store"),
            ({"model": {"patch_size": 5}}, 1, "not divisible by model.patch_size"),
            ({}, 3, "not a multiple of 3"),
            ({"start": "/nowhere"}, 1, "is no run"),
        ],
    )
    def test_refuses_what_training_would(self, configure, changes, ranks, message):
        with pytest.raises(InputError, match=message):
            plan(configure(**changes), num_ranks=ranks)


class TestCommand:
    def run(self, config, tmp_path, *options):
        file = tmp_path / "run.yaml"
        file.write_text(config.model_dump_json())
        return CliRunner().invoke(cli, ["train", str(file), *options])

    def test_prints_the_plan(self, configure, tmp_path):
        done = self.run(configure(), tmp_path, "--dry-run", "--ranks", "2", "model.size=paper")
        assert done.exit_code == 0, done.output
        assert "nothing is trained" in done.stdout
        assert "2 ranks of 4" in done.stdout
        assert not (tmp_path / "run").exists()

    def test_options_of_a_dry_run_alone(self, configure, tmp_path):
        done = self.run(configure(), tmp_path, "--ranks", "2")
        assert done.exit_code == 1
        assert "need --dry-run" in done.output
        done = self.run(configure(), tmp_path, "--dry-run", "--measure", "1", "--step-seconds", "1")
        assert "give either --step-seconds or --measure" in done.output
