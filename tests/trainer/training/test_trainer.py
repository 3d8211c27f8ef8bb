import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.store.lock import LockedError
from semroute.schemas import InputError, Routing, RoutingConfig, TrainConfig
from semroute.trainer.model.dit import DiT
from semroute.trainer.runs.checkpoint import latest_checkpoint
from semroute.trainer.runs.metrics import read_metrics
from semroute.trainer.runs.run import load_run
from semroute.trainer.training.dry_run import plan
from semroute.trainer.training.metrics import tracker_options
from semroute.trainer.training.optimizers import make_optimizers, make_schedule
from semroute.trainer.training.train import train
from semroute.trainer.training.trainer import TrainingInterrupted

NUMBERS = ("loss", "grad_norm", "lr", "routing_entropy")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure(configure, tmp_path):
    """The small run in ``tmp_path``; a mapping changes the keys that it names."""

    def changed(output="run", strategy="depth", **changes):
        parts = {
            "routing": {"strategy": strategy},
            "optimizer": {"lr": 1e-3, "warmup_steps": 3},
            "data": {"batch_size": 8, "noise_draws": 2, "prefetch": 2},
            "ema": {"every": 2},
        }
        for key, value in changes.items():
            parts[key] = parts.get(key, {}) | value if isinstance(value, dict) else value
        usual = {"steps": 6, "log_every": 2, "checkpoint_every": 100}
        return configure(tmp_path / output, **usual | parts)

    return changed


def tensors(path):
    checkpoint = latest_checkpoint(Path(path))
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in getattr(checkpoint, kind)().items()
    }


def assert_same_bits(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def numbers(path):
    return [[line["step"], *(line[name] for name in NUMBERS)] for line in read_metrics(Path(path))]


def routing_of(strategy):
    layers = {"one-per-block": [2, 4], "concat": [1, 3], "attention": [1, 3, 4]}
    layers["deep-fusion"] = [1, 3]
    extra = {"layers": layers[strategy]} if strategy in layers else {}
    if strategy in ("static", "time", "depth", "joint"):
        extra["uniform_penalty"] = 0.1
    return {"strategy": strategy, **extra}


VARIANTS = {
    "adamw": {},
    "muon": {"optimizer": {"name": "muon"}},
    "accumulation": {"grad_accum_steps": 2},
    "time, adaln, x0": {
        "strategy": "time",
        "model": {"conditioning": "adaln"},
        "flow": {"prediction": "x0"},
    },
    "bf16": {"mixed_precision": "bf16"},
    "penultimate": {"strategy": "penultimate"},
    "recipe": {
        "flow": {"t_density": "mode", "loss_weight": "min-snr", "shift_area": 36},
        "optimizer": {"decayed": "matrices"},
    },
}


class TestResume:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_continues_bit_for_bit(self, configure, variant):
        changes = VARIANTS[variant]
        whole = train(configure("whole", **changes))
        train(configure("parts", steps=2, **changes))
        parts = train(configure("parts", **changes))
        assert_same_bits(whole, parts)
        assert numbers(whole) == numbers(parts)

    @pytest.mark.parametrize("order", ["random", "shards"])
    def test_a_selection_and_a_mixture_continue(self, configure, order):
        stores = {name: getattr(configure(), name) for name in ("features", "latents")}
        source = {**stores, "proportion": 0.3, "select": {"filter": "sample_id < 20"}}
        data = {"select": {"filter": "sample_id >= 20"}, "mixture": [source]}
        changes = {"data": {**data, "order": order, "window": 2}, "steps": 40, "log_every": 1}
        whole, parts = configure("whole", **changes), configure("parts", **changes)
        train(parts.model_copy(update={"steps": 17}))
        for config in (whole, parts):
            train(config)
        assert_same_bits(whole.output, parts.output)
        assert numbers(whole.output) == numbers(parts.output)

    def test_after_a_kill_in_the_middle_of_everything(self, configure):
        whole = train(configure("whole"))
        config = configure("killed", checkpoint_every=3)
        train(config.model_copy(update={"steps": 5}))
        # As a kill at step 5 leaves it: metrics beyond the checkpoint, half a line, half a save.
        killed = Path(config.output)
        (killed / "checkpoints" / "step-00000005").rename(
            killed / "checkpoints" / "step-00000006.tmp"
        )
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')
        train(config)
        assert_same_bits(whole, killed)
        assert numbers(whole) == numbers(killed)
        assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == [
            "step-00000003",
            "step-00000006",
        ]

    @pytest.mark.parametrize("damage", ["model.safetensors", "state.json", "checksums.json"])
    def test_a_damaged_checkpoint_is_named_and_left_only_when_asked(
        self, configure, tmp_path, damage
    ):
        whole = train(configure("whole"))
        config = configure("damaged", checkpoint_every=2)
        train(config.model_copy(update={"steps": 4}))
        newest = latest_checkpoint(Path(config.output)).path
        content = (newest / damage).read_bytes()
        (newest / damage).write_bytes(content[:-9])
        (tmp_path / "run.json").write_text(config.model_dump_json())
        command = ["train", str(tmp_path / "run.json")]
        refused = CliRunner().invoke(cli, command)
        assert refused.exit_code == 1
        assert refused.output.startswith(f"Error: {newest} is damaged: ")
        assert "resume from step 2, add --from-checkpoint previous" in refused.output
        assert damage in refused.output
        assert newest.exists()
        for _ in range(2):  # the same command again sets nothing more aside
            done = CliRunner().invoke(cli, [*command, "--from-checkpoint", "previous"])
            assert done.exit_code == 0, done.output
        assert newest.with_name("step-00000004.damaged").exists()
        assert_same_bits(whole, config.output)
        assert numbers(whole) == numbers(config.output)

    def test_damaged_metrics_and_records_end_in_a_message(self, configure):
        path = train(configure(steps=2))
        for name, damaged in [
            ("metrics.jsonl", b"\xff\n"),
            ("metrics.jsonl", b"[1]\n"),
            ("metrics.jsonl", b'{"step": "2"}\n'),
            ("routing.jsonl", b"{}\n"),
            ("run.json", b"\x00"),
            ("run.json", b"[]"),
            ("run.json", b"{"),
        ]:
            content = (path / name).read_bytes()
            (path / name).write_bytes(damaged)
            with pytest.raises(InputError, match=name):
                train(configure(steps=2))
            (path / name).write_bytes(content)

    def test_a_finished_run_is_left_as_it_is(self, configure):
        path = train(configure())
        before = numbers(path)
        train(configure())
        assert numbers(path) == before

    @pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_saves_and_the_same_command_continues(self, configure, sign, capsys):
        whole = train(configure("whole", steps=40))
        config = configure("stopped", steps=40)
        metrics = Path(config.output) / "metrics.jsonl"

        def interrupt():
            deadline = time.monotonic() + 60
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(os.getpid(), sign)
            os.kill(os.getpid(), sign)  # a launcher hands on what the terminal has sent already

        sender = threading.Thread(target=interrupt)
        handler = signal.getsignal(sign)
        sender.start()
        with pytest.raises(TrainingInterrupted, match="Rerun the same command to resume"):
            train(config)
        sender.join()
        assert signal.getsignal(sign) is handler
        stopped = latest_checkpoint(Path(config.output)).step
        assert 2 <= stopped < 40
        assert f"Stopped after step {stopped} of 40" in capsys.readouterr().err
        train(config)
        assert_same_bits(whole, config.output)
        assert numbers(whole) == numbers(config.output)


@pytest.fixture(scope="module")
def store_of_mixes(feature_store, tmp_path_factory):
    """What two blocks read of the layers of ``feature_store``."""
    path = tmp_path_factory.mktemp("mixes") / "features"
    routing = Routing(
        strategy="depth", step=1, source="ema", layers=[1, 2, 3, 4], weights=[[0.25] * 4] * 2
    )
    rewrite(feature_store, path, routing=routing, workers=0, report=lambda _line: None)
    return path


class TestOutput:
    def test_another_configuration_is_refused_key_by_key(self, configure):
        train(configure(steps=1))
        with pytest.raises(InputError) as error:
            train(configure(steps=1, strategy="static", seed=7))
        assert "routing.strategy: 'static' instead of 'depth'" in str(error.value)
        assert "seed: 7 instead of 0" in str(error.value)

    def test_what_changes_no_weight_may_change(self, configure):
        path = train(configure(steps=2))
        train(configure(steps=4, log_every=1, keep_checkpoints=1, data={"prefetch": 1}))
        assert latest_checkpoint(path).step == 4
        assert [line["step"] for line in read_metrics(path)] == [2, 3, 4]

    def test_steps_may_not_shrink(self, configure):
        train(configure(steps=3))
        with pytest.raises(InputError, match="steps: 2 instead of 3"):
            train(configure(steps=2))

    def test_steps_may_not_grow_where_the_schedule_depends_on_them(self, configure):
        train(configure(steps=2, optimizer={"schedule": "cosine"}))
        with pytest.raises(InputError, match="steps: 3 instead of 2"):
            train(configure(steps=3, optimizer={"schedule": "cosine"}))

    def test_steps_may_grow_before_a_decay_but_not_after(self, configure):
        def config(output, **changes):
            return configure(output, optimizer={"schedule": "wsd", "decay_steps": 2}, **changes)

        whole = train(config("whole", steps=8, checkpoint_every=4))
        parts = train(config("parts", steps=6, checkpoint_every=4))
        with pytest.raises(InputError, match="steps: 8 instead of 6"):
            train(config("parts", steps=8))
        shutil.rmtree(parts / "checkpoints" / "step-00000006")
        train(config("parts", steps=8))
        assert_same_bits(whole, parts)
        with pytest.raises(ValueError, match=r"decay_steps is 2, but .* there are 1 steps"):
            configure(steps=4, optimizer={"schedule": "wsd", "decay_steps": 2})  # 3 of warm-up

    def test_another_store_is_refused(self, configure):
        path = train(configure(steps=1))
        record = json.loads((path / "run.json").read_text())
        record["features"]["captions"]["seed"] = 99
        (path / "run.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=r"features.captions.seed: 0 instead of 99"):
            train(configure(steps=1))

    def test_foreign_files_are_not_written_over(self, configure):
        config = configure()
        Path(config.output).mkdir()
        (Path(config.output) / "thesis.tex").write_text("")
        with pytest.raises(InputError, match=r"holds thesis.tex but no run.json. Name a new"):
            train(config)

    @pytest.mark.slow
    def test_one_process_trains_a_run(self, configure, tmp_path, capsys, start_command):
        config = configure(steps=60, log_every=1, checkpoint_every=2)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        child = start_command("train", tmp_path / "config.json")
        path = Path(config.output)
        child.wait_until(lambda: [*path.glob("checkpoints/step-*[0-9]")])
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(LockedError, match=f"written by process {child.pid} on .* stop it"):
            train(config)
        assert latest_checkpoint(path).step < 60
        child.kill()
        train(config)
        assert f"the lock of process {child.pid} on" in capsys.readouterr().err
        assert latest_checkpoint(path).step == 60
        assert not (path / "driver.json").exists()

    def test_a_file_is_not_a_directory(self, configure):
        config = configure()
        Path(config.output).write_text("")
        with pytest.raises(InputError, match="is a file; expected a new folder"):
            train(config)

    def test_only_the_newest_checkpoints_are_kept(self, configure):
        path = train(configure(steps=5, checkpoint_every=1, keep_checkpoints=2))
        names = sorted(p.name for p in (path / "checkpoints").iterdir())
        assert names == ["step-00000004", "step-00000005"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": {"patch_size": 5}}, "not divisible by model.patch_size 5"),
            ({"model": {"num_kv_heads": 3}}, "not a multiple of model.num_kv_heads 3"),
            ({"data": {"batch_size": 8}, "features": "/nowhere"}, "is no feature store"),
        ],
    )
    def test_nothing_is_written_before_everything_is_checked(self, configure, changes, message):
        config = configure(**changes)
        with pytest.raises(InputError, match=message):
            train(config)
        assert not Path(config.output).exists()

    def test_tensorboard_gets_the_same_numbers(self, configure):
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        path = train(configure(steps=4, log_every=2, tracker="tensorboard"))
        found = {}
        for file in path.rglob("events.out.tfevents*"):
            for event in EventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    if value.tag == "loss":
                        found[event.step] = value.tensor.float_val[0]
        expected = {line["step"]: line["loss"] for line in read_metrics(path)}
        assert found == pytest.approx(expected, rel=1e-6)

    def test_metrics_are_of_the_step_itself(self, configure):
        optimizer = {"schedule": "linear", "warmup_steps": 0, "lr": 1e-3}
        changes = {"steps": 4, "log_every": 1, "optimizer": optimizer, "strategy": "joint"}
        path = train(configure(**changes))
        lines = read_metrics(path)
        assert [line["lr"] for line in lines] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        for line in lines:
            groups = [line[f"grad_norm_{name}"] for name in ("router", "matrices", "others")]
            assert min(groups) > 0 or line["step"] == 1  # the last layer starts at zero
            assert math.hypot(*groups) == pytest.approx(line["grad_norm"], rel=1e-5)
            # 9 patches of each image and draw
            assert line["tokens_per_second"] == pytest.approx(18 * line["samples_per_second"])
            assert line["peak_memory_bytes"] > 2**20
        run, own = load_run(path), load_run(path, weights="model")
        pairs = zip(own.model.parameters(), run.model.parameters(), strict=True)
        apart, size = np.sum([[(w - e).square().sum(), w.square().sum()] for w, e in pairs], 0)
        assert lines[-1]["ema_distance"] == pytest.approx((apart / size) ** 0.5, rel=1e-4)
        assert load_run(path).metrics()["peak_flops_share"].null_count == 4

    def test_a_resumed_run_is_the_same_to_a_tracker(self, configure, monkeypatch):
        """By the arguments that reach it: trackers that need an account are not run here."""
        seen = []

        def init(self, name, config=None, init_kwargs=None):
            seen.append(init_kwargs["wandb"])

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json"))
        monkeypatch.setattr(Accelerator, "init_trackers", init)
        monkeypatch.setattr(
            "semroute.trainer.training.accelerator.Accelerator",
            lambda log_with=None, **options: Accelerator(**options),
        )
        config = configure("one", tracker="wandb", steps=2)
        train(config)
        train(config.model_copy(update={"steps": 4}))
        train(configure("two", tracker="wandb", steps=2))
        first, again, other = (each["id"] for each in seen)
        assert first == again != other
        assert {each["resume"] for each in seen} == {"allow"}
        options = tracker_options("runs/depth", first)
        assert options["swanlab"]["id"] == first[:21]
        assert options["comet_ml"]["experiment_key"] == first

    def test_a_tracker_that_is_not_installed_is_named(self, configure, monkeypatch):
        def find(name):
            return None if name == "comet_ml" else find_spec(name)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        with pytest.raises(InputError, match=r"comet_ml is not installed: pip install comet-ml"):
            train(configure(steps=2, tracker="comet_ml"))

    def test_trackers_are_those_of_accelerate(self):
        from accelerate.utils import LoggerType

        known = {*get_args(TrainConfig.model_fields["tracker"].annotation)}
        assert known - {"none"} <= {*map(str, LoggerType)} - {"all"}

    def test_fp16_is_refused_with_a_reason(self, configure):
        with pytest.raises(ValueError, match=r"65,504.*use bf16"):
            configure(mixed_precision="fp16")


class TestTraining:
    def test_learns_and_says_so(self, configure):
        path = train(
            configure(
                steps=60,
                log_every=20,
                flow={"shift": 1.0},
                optimizer={"lr": 3e-3},
                data={"batch_size": 16},
            )
        )
        lines = read_metrics(path)
        assert [line["step"] for line in lines] == [20, 40, 60]
        assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
        assert lines[-1]["routing_entropy"] < 1.0
        for line in lines:
            assert 0 <= line["data_wait_share"] <= 1
            assert line["samples_per_second"] > 0
        alpha = load_run(path).weights()
        assert alpha.shape == (1, 2, 4)

    @pytest.mark.parametrize(
        "routing",
        [
            {"strategy": "token", "top_k": 2},
            {"strategy": "depth", "weights": "signed", "rank": 2, "smooth_penalty": 0.1},
            {"strategy": "time", "t_jitter": 0.1},
            {"strategy": "one-per-block"},
            {"strategy": "concat", "layers": [1, 3]},
            {"strategy": "attention", "layers": [1, 3, 4]},
        ],
        ids=lambda routing: routing["strategy"],
    )
    def test_strategies_train_and_continue_bit_for_bit(self, configure, routing):
        whole = train(configure("whole", routing=routing))
        half = configure("parts", routing=routing, steps=4)
        train(half)
        train(configure("parts", routing=routing, gradient_checkpointing=True))
        assert_same_bits(whole, Path(half.output))
        weights = load_run(whole).weights()
        assert weights.shape == (21 if routing["strategy"] == "time" else 1, 2, 4)
        assert np.isfinite(weights).all()

    def test_a_jitter_is_told_to_the_gates_alone(self, configure):
        runs = [
            train(configure(name, routing={"strategy": "time", **changes}, steps=3))
            for name, changes in (("exact", {}), ("jittered", {"t_jitter": 0.2}))
        ]
        # Gates start as uniform whatever they are told: the first loss is the same.
        losses = [read_metrics(path)[0]["loss"] for path in runs]
        assert losses[0] == losses[1]
        # And the network's first prediction is zero whatever it reads: then they learn apart.
        gates = [tensors(path)["model/router.gates.weight_out"] for path in runs]
        assert not torch.equal(*gates)

    def test_a_penalty_acts_and_is_not_in_the_loss(self, configure):
        routing = {"strategy": "depth", "uniform_penalty": 1e4}
        optimizer = {"router_lr": 0.1}
        free, held = (
            train(configure(name, optimizer=optimizer, routing=changes, steps=30))
            for name, changes in (("free", {}), ("held", routing))
        )
        spread = [load_run(path, weights="model").weights().std() for path in (free, held)]
        assert spread[1] < 0.5 * spread[0]
        losses = [read_metrics(path)[-1]["loss"] for path in (free, held)]
        assert losses[1] == pytest.approx(losses[0], rel=0.5)

    def test_start_refuses_a_projection_of_another_width(self, configure):
        start = str(train(configure("start", routing={"strategy": "concat", "layers": [1, 3]})))
        with pytest.raises(InputError, match="width_read: 32 instead of 64"):
            train(configure("other", start=start))

    def test_a_loss_that_is_not_finite_stops_with_the_samples(self, configure):
        config = configure(optimizer={"lr": 1e30, "warmup_steps": 0}, steps=50)
        with pytest.raises(FloatingPointError, match=r"samples of this rank: \d+, .*learning"):
            train(config)


class TestRanks:
    """Real processes: accelerate's own launcher runs only one on a CPU."""

    def wait_for(self, path, step, process):
        """Until that step is logged."""
        process.wait_until(lambda: any(line["step"] >= step for line in read_metrics(Path(path))))

    @pytest.mark.slow
    def test_two_and_four_are_killed_and_one_continues(self, configure, launch):
        """What a sample adds to the loss is a function of its position, its t and noise included:
        equal losses, step by step, are equal samples. An epoch has 25 steps."""
        rng = np.random.default_rng()
        changes = {"log_every": 1, "steps": 40, "checkpoint_every": 4}
        changes["validation"] = {"share": 0.1, "every": 4, "num_samples": 12, "num_bins": 4}
        whole, config = train(configure("whole", **changes)), configure("two", **changes)
        last, by_ranks = 0, []
        for num_ranks in (2, 4):
            ranks = launch(config, words=["train"], num_ranks=num_ranks)
            self.wait_for(config.output, last + int(rng.integers(5, 12)), ranks[0])
            while (
                getattr(latest_checkpoint(Path(config.output)), "step", 0) <= last
            ):  # it is written while training goes on
                assert ranks[0].poll() is None
                time.sleep(0.01)
            for rank in rng.permutation(ranks):
                rank.kill()
            killed = latest_checkpoint(Path(config.output))
            assert last < killed.step < 40
            assert killed.state().num_ranks == num_ranks
            last = killed.step
            by_ranks += [line for line in read_metrics(Path(config.output)) if line["step"] <= last]
        train(config)
        expected, found = (
            {line["step"]: line for line in read_metrics(Path(path))}
            for path in (whole, config.output)
        )
        assert [*found] == [*range(1, 41)]
        for step, line in found.items():
            assert line["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4), step
        losses = [line["loss"] for line in expected.values()]
        assert len({round(loss, 3) for loss in losses}) > 20
        for line in by_ranks:
            assert line["loss"] == pytest.approx(expected[line["step"]]["loss"], rel=1e-4)
            if "validation_by_t" in line:
                assert line["validation_by_t"] == pytest.approx(
                    expected[line["step"]]["validation_by_t"], rel=1e-3
                )
        first, second = tensors(whole), tensors(config.output)
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-2, atol=1e-4)

    @pytest.mark.slow
    def test_a_rank_that_stops_ends_the_other_with_its_message(self, configure, launch, tmp_path):
        """And so does one that finds another folder. What a rank cannot read, it alone knows."""
        (tmp_path / "broken.py").write_text(BROKEN)
        config = configure(steps=5000)
        ranks = launch(config, module="broken", PYTHONPATH=str(tmp_path))
        told = ranks[1].output
        ranks[1].wait_until(lambda: told.exists() and "cannot be read" in told.read_text())
        start = time.monotonic()
        assert [rank.wait(30) for rank in ranks] == [1, 1]
        assert time.monotonic() - start < 15
        outputs = [rank.output.read_text() for rank in ranks]
        assert "InputError: shard 7 cannot be read" in outputs[1]
        assert re.search("rank 1 on .* stopped: shard 7 cannot be read", outputs[0])

        ranks = launch(configure("shared"), words=["train"], each=["", f"output={tmp_path}/own"])
        for rank in ranks:
            assert rank.wait(60) == 1
            found = rank.output.read_text()
            assert "Error: the ranks do not share the run directory:" in found
            assert f"finds {tmp_path}/own, which does not exist" in found
        assert not (tmp_path / "own").exists()

    @pytest.mark.slow
    def test_sigterm_while_a_checkpoint_is_written(self, configure, start_command, tmp_path):
        """The older one is finished first. If a kill follows before the last one is written, the
        run resumes from it."""
        (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
        config = configure(steps=12, log_every=1, checkpoint_every=3)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        folder = Path(config.output) / "checkpoints"
        child = start_command(
            tmp_path / "config.json", module="slow_disk", PYTHONPATH=str(tmp_path)
        )
        self.wait_for(config.output, 5, child)  # it trains on
        assert [path.suffix for path in folder.iterdir()] == [".tmp"]
        os.kill(child.pid, signal.SIGTERM)
        child.wait_until(lambda: len([*folder.iterdir()]) == 2)  # the second one is begun
        child.kill()
        assert latest_checkpoint(Path(config.output)).step == 3
        train(config)
        assert_same_bits(train(configure("whole", steps=12)), config.output)
        assert {path.suffix for path in folder.iterdir()} == {""}

    @pytest.mark.slow
    def test_sigterm_saves_on_all_ranks(self, configure, tmp_path, start_command):
        """Torchrun starts them, and passes the signal on."""
        config = configure(steps=5000, log_every=1, checkpoint_every=5000)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        words = ["--nproc_per_node=2", "--standalone", "-m", "semroute.cli", "train"]
        words.append(tmp_path / "config.json")
        process = start_command(*words, module="torch.distributed.run", ACCELERATE_USE_CPU="1")
        self.wait_for(config.output, 2, process)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() != 0
        output = process.output.read_text()
        stopped = latest_checkpoint(Path(config.output)).step
        assert f"Stopped after step {stopped} of 5000" in output
        assert read_metrics(Path(config.output))[-1]["step"] == stopped

    @pytest.mark.slow
    def test_fsdp2_in_bfloat16_is_one_process_for_every_strategy(
        self, configure, launch, store_of_mixes
    ):
        """In bfloat16 t would keep two digits, of an angle of up to 1000; and weights of layers,
        norms and sums would be rounded."""
        strategies = [*get_args(RoutingConfig.model_fields["strategy"].annotation)]
        changes = {"mixed_precision": "bf16", "log_every": 1, "steps": 4}
        configs = {
            strategy: configure(strategy, routing=routing_of(strategy), **changes)
            for strategy in strategies
        }
        configs["mixes"] = configs["mixes"].model_copy(update={"features": str(store_of_mixes)})
        muon = {"optimizer": {"name": "muon"}, "routing": routing_of("depth")}
        configs["muon"] = configure("muon", **muon, **changes)
        path = str(Path(__file__).parents[2])
        for rank in launch(*configs.values(), module="run_sharded", PYTHONPATH=path):
            assert rank.wait(400) == 0, rank.output.read_text()
        for strategy, config in configs.items():
            output = str(Path(config.output).with_name(f"whole-{strategy}"))
            whole = train(config.model_copy(update={"output": output}), progress=False)
            found, expected = (
                np.array([[line["loss"], line["grad_norm"]] for line in read_metrics(Path(path))])
                for path in (config.output, whole)
            )
            assert found == pytest.approx(expected, rel=1e-3), strategy
            first, second = tensors(whole), tensors(config.output)
            assert first.keys() == second.keys()
            for name in first:  # Adam divides a gradient near zero by its own size
                close = torch.isclose(second[name], first[name], rtol=1e-2, atol=1e-3)
                assert close.float().mean() > 0.98, (strategy, name)

    def test_deepspeed_is_refused_before_anything_is_written(
        self, configure, tmp_path, monkeypatch
    ):
        """``accelerate launch`` sets this variable from ``distributed_type: DEEPSPEED``."""
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        config = configure()
        (tmp_path / "run.json").write_text(config.model_dump_json())
        outcome = CliRunner().invoke(cli, ["train", str(tmp_path / "run.json")])
        assert outcome.exit_code == 1
        assert outcome.output == (
            "Error: found DeepSpeed (ACCELERATE_USE_DEEPSPEED is set), expected DDP or FSDP2: "
            "launch with docs/accelerate/ddp.yaml or fsdp2.yaml, see docs/training.md\n"
        )
        assert not Path(config.output).exists()
        with pytest.raises(InputError, match="found DeepSpeed"):
            plan(config, measure_steps=1)

    def test_ranks_that_do_not_see_each_other_are_refused(self, configure, monkeypatch, tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="2 processes were started, and"):
            train(configure())
        assert not (tmp_path / "run").exists()


BROKEN = """
import sys
from semroute.schemas import InputError, TrainConfig
from semroute.trainer.data.loader import PackedLoader
from semroute.trainer.training import train as module

make = module.make_loader
def make_loader(setup, *, rank, **options):
    loader = make(setup, rank=rank, **options)
    read, read_step = loader.read, 3
    def broken(step, *arguments):
        if rank == 1 and step == read_step:
            raise InputError("shard 7 cannot be read")
        return read(step, *arguments)
    loader.read = broken
    return loader
module.make_loader = make_loader
module.train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
"""

SLOW_DISK = """
import sys, time
from semroute.schemas import TrainConfig
from semroute.trainer.training import saver, train

write = saver.write_part
def write_part(folder, *arguments):
    folder.mkdir(parents=True)
    time.sleep(8)
    return write(folder, *arguments)
saver.write_part = write_part
train.train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))
"""


class TestIsolation:
    @pytest.mark.slow
    def test_training_imports_neither_the_llm_library_nor_pandas(self, configure, tmp_path):
        config = configure(steps=1)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        code = (
            "import sys\n"
            "from semroute.schemas import TrainConfig\n"
            "from semroute.trainer.training.train import train\n"
            "train(TrainConfig.model_validate_json(open(sys.argv[1]).read()))\n"
            "from semroute.trainer.runs.run import load_run\n"
            "found = {name.partition('.')[0] for name in sys.modules}\n"
            "unused = {'transformers', 'tokenizers', 'dask', 'distributed', 'pandas'}\n"
            "print(sorted(found & unused))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "config.json")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"


class TestOptimizers:
    def dit(self, configure, strategy):
        config = configure(strategy=strategy)
        return DiT(
            config.model,
            config.routing,
            latent_shape=(3, 12, 12),
            layers=[1, 2, 3, 4],
            num_llm_layers=4,
            text_width=32,
        )

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("strategy", ["uniform", "depth", "joint"])
    def test_every_parameter_is_in_one_group(self, configure, name, strategy):
        dit = self.dit(configure, strategy)
        config = configure(optimizer={"name": name}).optimizer
        optimizers = make_optimizers(dit, config)
        assert len(optimizers) == (2 if name == "muon" else 1)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        numbered = [id(p) for group in groups for p in group["params"]]
        assert sorted(numbered) == sorted(id(p) for p in dit.parameters())

    def test_the_router_has_its_own_rate_and_no_decay(self, configure):
        dit = self.dit(configure, "depth")
        config = configure(optimizer={"router_lr": 0.03, "weight_decay": 0.1}).optimizer
        (adamw,) = make_optimizers(dit, config)
        others, router = adamw.param_groups
        assert (others["lr"], others["weight_decay"]) == (1e-3, 0.1)
        assert (router["lr"], router["weight_decay"]) == (0.03, 0.0)
        assert [id(p) for p in router["params"]] == [id(p) for p in dit.router_parameters()]

    def test_norms_and_biases_need_not_decay(self, configure):
        dit = self.dit(configure, "joint")
        config = configure(optimizer={"decayed": "matrices", "name": "muon"}).optimizer
        decayed = {
            id(parameter)
            for optimizer in make_optimizers(dit, config)
            for group in optimizer.param_groups
            if group["weight_decay"]
            for parameter in group["params"]
        }
        router = {id(parameter) for parameter in dit.router_parameters()}
        expected = {id(p) for p in dit.parameters() if p.ndim > 1} - router
        assert decayed == expected

    @pytest.mark.parametrize("strategy", ["static", "depth", "time", "joint"])
    def test_a_logit_moves_by_about_the_routers_rate_whatever_the_strategy(
        self, configure, strategy
    ):
        moved = {}
        for scaling in ("fan_in", "none"):
            dit = self.dit(configure, strategy)
            options = {"router_lr": 1e-3, "router_scaling": scaling}
            optimizer = make_optimizers(dit, configure(optimizer=options).optimizer)[0]
            for _ in range(10):
                logits = dit.router.logits(torch.linspace(0, 1, 16))
                optimizer.zero_grad()
                (logits[..., 0] - logits[..., 1:].mean(-1)).mean().neg().backward()
                optimizer.step()
            moved[scaling] = dit.router.logits(torch.linspace(0, 1, 16))[..., 0].mean().item() / 10
        assert 0.5e-3 < moved["fan_in"] < 3e-3
        if strategy in ("time", "joint"):
            assert moved["none"] > 20e-3

    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            ("constant", [0.5, 1, 1, 1, 1]),
            ("linear", [0.5, 1, 0.75, 0.5, 0.25]),
            ("cosine", [0.5, 1, 0.8536, 0.5, 0.1464]),
            ("cosine-restarts", [0.5, 1, 0.5, 1, 0.5]),
            ("wsd", [0.5, 1, 1, 1, 1 - math.sqrt(0.5)]),
        ],
    )
    @pytest.mark.parametrize("start", [0, 1, 3])
    def test_schedules_are_functions_of_the_step(self, configure, schedule, expected, start):
        own = {"cosine-restarts": {"num_cycles": 2}, "wsd": {"decay_steps": 2}}.get(schedule, {})
        optimizer = {"warmup_steps": 1, "schedule": schedule, "lr": 1.0, **own}
        config = configure(steps=5, optimizer=optimizer)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make_schedule(optimizer, config, start)
        found = []
        for _ in range(start, 5):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert found == pytest.approx(expected[start:], abs=1e-4)
