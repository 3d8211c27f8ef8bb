"""``semroute study`` on a world that the tiny LLM read, in real processes."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from matplotlib.figure import Figure

from semroute.cli import cli
from semroute.schemas import InputError, Scoring, StudyConfig, parse
from semroute.trainer.evaluation.shapes import read_captions, score_each_image, score_run
from semroute.trainer.runs.run import load_run
from semroute.trainer.runs.scores import EvaluationReport
from semroute.trainer.shapes.images import render
from semroute.trainer.studies.ablation import swapped_weights, swaps
from semroute.trainer.studies.runner import visible_gpus

TRAIN = {
    "steps": 4,
    "mixed_precision": "no",
    "log_every": 1,
    "checkpoint_every": 2,
    "model": {"size": "nano", "depth": 2, "patch_size": 6},
    "flow": {"prediction": "x0", "shift": 1.0},
    "optimizer": {"name": "muon"},
    "data": {"batch_size": 4, "noise_draws": 2},
    "ema": {"decay": 0.5, "every": 1},
}


def group_lives(group):
    """Whether a process group has a process left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def kill_once(start_command):
    """Run a command in a process of its own, and kill it as soon as something is true."""

    def kill_once(ready, *arguments):
        process = start_command(*arguments)
        process.wait_until(ready)
        process.kill()
        deadline = time.monotonic() + 30
        while group_lives(process.pid):  # a study's runs end with their driver
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return kill_once


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llm, fork_server):
    root = tmp_path_factory.mktemp("study")
    invoke("shapes", root / "shapes", "--num", 80, "--num-test", 12, "--num-dev", 6)
    for name in ("train", "dev", "test"):
        file = root / "shapes" / f"{name}.parquet"
        invoke("extract", file, root / name, "--model", tiny_llm, "--workers", 0)
    invoke("latents", root / "shapes" / "train.parquet", root / "latents", "--workers", 0)
    return root


def document(world, out, **changes):
    """A study of two arms and two seeds that tunes the router's rate."""

    def scoring(name):
        return {
            "features": str(world / name),
            "samples": str(world / "shapes" / f"{name}.parquet"),
            "cfg_scales": [1.0, 3.0],
            "num_steps": 2,
        }

    return {
        "output": str(out),
        "train": {"features": str(world / "train"), "latents": str(world / "latents"), **TRAIN},
        "arms": {
            "uniform": {"routing.strategy": "uniform"},
            "depth": {"routing.strategy": "depth"},
        },
        "reference": "uniform",
        "seeds": [0, 1],
        "scoring": scoring("test"),
        "tuning": {
            "values": [0.001, 0.1],
            "steps": 2,
            "seeds": [7],
            "skill": "total",
            "scoring": scoring("dev"),
        },
        **changes,
    }


def replaced(table, name, value):
    """A table with another column of that name, each row of which has a value."""
    column = pa.concat_arrays([value] * len(table))
    return table.set_column(table.schema.get_field_index(name), name, column)


def damaged_copy(done, tmp_path):
    """A study's file and folder, to be damaged, without its runs."""
    out = tmp_path / "out"
    shutil.copytree(done[1], out, ignore=shutil.ignore_patterns("runs", "tuning"))
    return write(
        tmp_path / "damaged.yaml", {**yaml.safe_load(done[0].read_text()), "output": str(out)}
    ), out


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(world):
    """A study run to its end: its file, its folder, and what it printed. Tests that run it on do so
    in a copy, so that no other depends on when they ran."""
    out = world / "done"
    file = write(world / "done.yaml", document(world, out))
    return file, out, invoke("study", file, "--jobs", 2)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not drawn, which takes most of the time of a study that has little to
    do. Tests that look at them draw them."""

    def savefig(_figure, file, **_options):
        if isinstance(file, str | Path):
            Path(file).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)


class TestStudy:
    def test_every_run_is_trained_and_scored(self, done):
        _, out, printed = done
        table = pq.read_table(out / "results.parquet")
        runs = set(zip(table["arm"].to_pylist(), table["seed"].to_pylist(), strict=True))
        assert runs == {(arm, seed) for arm in ("uniform", "depth") for seed in (0, 1)}
        assert set(table["cfg_scale"].to_pylist()) == {1.0, 3.0}
        assert set(table["split"].to_pylist()) == {"test", "held-out"}
        total = table.filter([skill == "total" for skill in table["skill"].to_pylist()])
        assert total.num_rows == 2 * 2 * 2 * 12
        for arm, seed in runs:
            assert load_run(out / "runs" / arm / f"seed-{seed}").step == 4
        for name in ("results.parquet", "report.md", "figures/scores.png"):
            assert str(out / name) in printed
            assert (out / name).stat().st_size > 0

    def test_settings_are_chosen_on_dev_and_used(self, done):
        _, out, printed = done
        assert "uniform: nothing to tune" in printed
        scores = json.loads((out / "tuning.json").read_text())
        assert list(scores) == ["depth"]
        assert set(scores["depth"]) == {"0.001", "0.1"}
        best = float(max(scores["depth"], key=scores["depth"].get))
        for seed in (0, 1):
            config = load_run(out / "runs" / "depth" / f"seed-{seed}").record.config
            assert config.optimizer.router_lr == best
            assert config.seed == seed
        tried = pq.read_table(out / "tuning" / "depth" / "0.1" / "seed-7" / "judged.parquet")
        assert set(tried["split"].to_pylist()) == {"dev"}

    @pytest.mark.usefixtures("undrawn")
    def test_an_arm_tunes_a_setting_of_its_own(self, world, tmp_path):
        out, content = tmp_path / "out", document(world, tmp_path / "out", seeds=[0])
        own = {"key": "optimizer.lr", "values": [1e-4, 1e-2]}
        content["arms"]["uniform"]["tuning"] = own
        invoke("study", write(tmp_path / "study.yaml", content), "--jobs", 2)
        scores = json.loads((out / "tuning.json").read_text())
        assert {arm: [*each] for arm, each in scores.items()} == {
            "uniform": ["0.0001", "0.01"],
            "depth": ["0.001", "0.1"],
        }
        best = float(max(scores["uniform"], key=scores["uniform"].get))
        config = load_run(out / "runs" / "uniform" / "seed-0").record.config
        assert config.optimizer.lr == best
        report = (out / "report.md").read_text()
        parts = report.partition("by `optimizer.lr`:")[2].partition("by `optimizer.router_lr`:")
        assert "- uniform: 0.0001: " in parts[0]
        assert "- depth: 0.001: " in parts[2]

    def test_the_report_compares_with_the_reference(self, done):
        report = (done[1] / "report.md").read_text()
        assert "2 arms x 2 seeds" in report
        assert "## held-out, guidance 3" in report
        assert "| **" not in report  # of two seeds no difference is marked
        lines = [line.split("|") for line in report.splitlines() if line.startswith("| all |")]
        assert {line[4].strip() for line in lines} == {"uniform", "depth"}
        for line in lines:
            assert line[6].strip() == ("uniform" if line[4].strip() == "depth" else "")
            assert bool(line[7].strip()) == (line[4].strip() == "depth")
        summary = report[report.index("## test, all: ") : report.index("## test, binding: ")]
        (depth,) = [line for line in summary.splitlines() if line.startswith("| depth | uniform |")]
        assert len(depth.split("|")) == 2 + 2 + 2 * 2

    @pytest.mark.parametrize(
        ("arm", "message"),
        [
            ({"features": "dev"}, "dev has 6 samples but"),
            ({"features": "nowhere"}, "nowhere is no feature store"),
            (
                {"data.mixture": [{"features": "train", "latents": "other", "proportion": 0.5}]},
                "other is no latent store",
            ),
            ({"data.conditioning": "nowhere"}, "nowhere is no conditioning store"),
            ({"scoring": {"features": "nowhere"}}, "nowhere is no feature store"),
            ({"scoring": {"features": "dev"}}, "dev was not extracted from"),
            ({"scoring": {"features": "fewer"}}, "arm depth is trained on other features"),
        ],
    )
    def test_stores_of_every_arm_are_opened_before_a_run_starts(
        self, world, tmp_path, monkeypatch, arm, message
    ):
        monkeypatch.chdir(world)
        if not Path("fewer").exists():
            invoke("rewrite", "test", "fewer", "--layers", "2,3", "--workers", 0)
        content = document(world, tmp_path / "out")
        content["arms"]["depth"] |= arm
        del content["tuning"]  # for which they are opened, too
        assert message in invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert not (tmp_path / "out" / "runs").exists()

    def test_captions_to_choose_by_are_opened_before_a_trial_starts(self, world, tmp_path):
        content = document(world, tmp_path / "out")
        content["tuning"]["scoring"]["features"] = str(world / "train")
        printed = invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert f"{world / 'train'} was not extracted from" in printed
        assert not (tmp_path / "out" / "tuning").exists()

    @pytest.mark.usefixtures("undrawn")
    def test_run_again_does_nothing(self, done):
        file, out, _ = done
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        assert "study: 4 runs, to do: 0" in invoke("study", file)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before

    @pytest.mark.usefixtures("undrawn")
    def test_it_grows_and_says_what_is_missing(self, world, done, tmp_path):
        out = shutil.copytree(done[1], tmp_path / "out")
        file = write(tmp_path / "grown.yaml", document(world, out, seeds=[0, 1, 2]))
        invoke("study", file, "--report-only")
        report = (out / "report.md").read_text()
        assert "Not done yet and left out: `uniform`: 2; `depth`: 2." in report
        printed = invoke("study", file)
        assert "study: 6 runs, to do: 2" in printed
        assert "Not done yet" not in (out / "report.md").read_text()

    @pytest.mark.usefixtures("undrawn")
    def test_scoring_differently_scores_again_and_trains_nothing(self, world, done, tmp_path):
        out = shutil.copytree(done[1], tmp_path / "out")
        changed = document(world, out)
        changed["scoring"]["cfg_scales"] = [2.0]
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        assert "study: 4 runs, to do: 4" in invoke("study", write(tmp_path / "other.yaml", changed))
        assert set(pq.read_table(out / "results.parquet")["cfg_scale"].to_pylist()) == {2.0}
        after = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        assert {path.parent.parent for path in after} == {path.parent.parent for path in before}

    @pytest.mark.usefixtures("undrawn")
    def test_an_arm_of_another_scores_its_runs_and_trains_nothing(self, world, done, tmp_path):
        out = shutil.copytree(done[1], tmp_path / "out")
        changed = document(world, out)
        changed["arms"] |= {
            "late": {"of": "depth", "scoring": {"cfg_interval": [0.0, 0.5]}},
            "once": {"routing.strategy": "static", "seeds": [1], "scoring": {"solver": "heun"}},
        }
        changed["arms"]["once"]["against"] = "late"
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        printed = invoke("study", write(tmp_path / "others.yaml", changed))
        assert "scored differently: 2 runs, to do: 2" in printed
        after = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        assert {path: after[path] for path in before if "static" not in path.parts} == before
        assert {path.name for path in (out / "runs").iterdir()} == {"uniform", "depth", "once"}
        table = pq.read_table(out / "results.parquet")
        runs = set(zip(table["arm"].to_pylist(), table["seed"].to_pylist(), strict=True))
        assert {seed for arm, seed in runs if arm == "late"} == {0, 1}
        assert {seed for arm, seed in runs if arm == "once"} == {1}
        report = (out / "report.md").read_text()
        assert (
            "Arms with fewer seeds, over which their differences are paired: `once`: 1." in report
        )
        assert "`late`: depth with cfg_interval [0.0, 0.5]" in report
        assert "| late | depth |" in report
        assert "| once | late |" in report
        assert set(json.loads((out / "tuning.json").read_text())) == {"depth", "once"}

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda table: table.drop_columns(["skill"]), "has 0 columns skill; expected one"),
            (lambda table: table.slice(0, 0), "has no rows"),
            (
                lambda table: table.replace_schema_metadata({"judged": "[1]"}),
                "judged are no object",
            ),
            (lambda table: table.replace_schema_metadata(None), "does not say how uniform/0 was"),
            (lambda table: replaced(table, "right", pa.array(["yes"])), "column right is string"),
            (
                lambda table: replaced(table, "seed", pa.nulls(1, pa.int64())),
                "values of seed are missing",
            ),
            (lambda table: replaced(table, "skill", pa.array(["magic"])), "'magic' is not a skill"),
        ],
    )
    def test_damaged_scores_are_refused(self, done, tmp_path, damage, message):
        file, out = damaged_copy(done, tmp_path)
        pq.write_table(damage(pq.read_table(out / "results.parquet")), out / "results.parquet")
        printed = invoke("study", file, "--report-only", code=1)
        assert "results.parquet does not hold scores of a study" in printed
        assert message in printed

    @pytest.mark.parametrize("content", ["[]", '{"depth": 3}', '{"depth": {"0.1": "best"}}', "{"])
    def test_damaged_choices_are_refused(self, done, tmp_path, content):
        file, out = damaged_copy(done, tmp_path)
        (out / "tuning.json").write_text(content)
        assert "tuning.json is damaged" in invoke("study", file, "--report-only", code=1)

    def test_scores_runs_along_the_way(self, world, done, tmp_path):
        out = shutil.copytree(done[1], tmp_path / "out")
        file = write(tmp_path / "along.yaml", document(world, out, along=[2]))
        printed = invoke("study", file)
        assert "study: 4 runs, to do: 0" in printed
        assert "scored differently: 4 runs, to do: 4" in printed
        report = (out / "report.md").read_text()
        assert "| depth-at-2 | uniform-at-2 |" in report
        assert "| uniform-at-2 | uniform |" in report
        assert (out / "figures" / "training.png").exists()
        # The same as the runs had at that step, when it was their last.
        content = document(world, out)
        content["train"] = {**content["train"], "steps": 2}
        content["output"] = str(tmp_path / "short")
        content["seeds"] = [1]
        (tmp_path / "short").mkdir()
        for name in ("tuning", "tuning.json", "trials.parquet"):
            copy = shutil.copytree if (out / name).is_dir() else shutil.copy
            copy(out / name, tmp_path / "short" / name)
        invoke("study", write(tmp_path / "short.yaml", content), "--arm", "uniform")
        expected = pq.read_table(tmp_path / "short" / "results.parquet").drop_columns("arm")
        found = pq.read_table(out / "results.parquet", filters=[("arm", "=", "uniform-at-2")])
        found = found.filter(pc.equal(found["seed"], 1)).drop_columns("arm")
        assert found.replace_schema_metadata(None).equals(expected.replace_schema_metadata(None))

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.slow
    def test_killed_and_resumed_gives_the_same_scores(self, world, done, tmp_path, kill_once):
        content = document(world, tmp_path / "out", tuning=None, seeds=[0])
        del content["tuning"]
        content["train"] = {**content["train"], "steps": 12}
        file = write(tmp_path / "study.yaml", content)
        kill_once(lambda: [*(tmp_path / "out").rglob("step-*")], "study", file, "--jobs", 2)
        invoke("study", file)
        content["output"] = str(tmp_path / "whole")
        invoke("study", write(tmp_path / "whole.yaml", content))
        found, expected = (
            pq.read_table(tmp_path / name / "results.parquet") for name in ("out", "whole")
        )
        assert found.equals(expected)

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.slow
    def test_scores_outlive_their_runs(self, world, tmp_path):
        out = tmp_path / "out"
        content = document(world, out, seeds=[0])
        content["arms"]["late"] = {"of": "depth", "scoring": {"cfg_interval": [0.0, 0.5]}}
        file = write(tmp_path / "study.yaml", content)
        invoke("study", file)
        report, results = (out / "report.md").read_text(), pq.read_table(out / "results.parquet")
        shutil.rmtree(out / "runs")
        shutil.rmtree(out / "tuning")
        printed = invoke("study", file)
        assert "tuning: 2 runs, to do: 0" in printed
        assert "study: 2 runs, to do: 0" in printed
        assert "scored differently: 1 runs, to do: 0" in printed
        assert (out / "report.md").read_text() == report
        assert pq.read_table(out / "results.parquet").equals(results)
        assert not (out / "runs").exists()

        # Those of an arm that is left out for a while stay; those of another training do not.
        fewer = {**content, "arms": {"uniform": content["arms"]["uniform"]}}
        fewer["train"] = {**content["train"], "steps": 6}
        tuning = (out / "tuning.json").read_text()
        assert "study: 1 runs, to do: 1" in invoke("study", write(tmp_path / "fewer.yaml", fewer))
        assert "depth" not in (out / "report.md").read_text()
        assert (out / "tuning.json").read_text() == tuning
        assert "study: 2 runs, to do: 1" in invoke("study", file, code=1)
        table = pq.read_table(out / "results.parquet")
        assert {*table["arm"].to_pylist()} == {"uniform", "depth", "late"}

    @pytest.mark.usefixtures("undrawn")
    def test_some_arms_alone_and_what_is_known_of_others_stays(self, world, done, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        for name in ("results.parquet", "trials.parquet", "tuning.json"):
            shutil.copy(done[1] / name, out)
        content = document(world, out)
        content["arms"]["late"] = {"of": "depth", "scoring": {"cfg_interval": [0.0, 0.5]}}
        file = write(tmp_path / "study.yaml", content)
        assert "study: 2 runs, to do: 0" in invoke("study", file, "--arm", "uniform")
        report = (out / "report.md").read_text()
        assert "1 arms x 2 seeds" in report
        assert "depth" not in report
        assert {*pq.read_table(out / "results.parquet")["arm"].to_pylist()} == {"uniform", "depth"}
        invoke("study", file, "--report-only", "--arm", "late")
        report = (out / "report.md").read_text()
        assert "3 arms x 2 seeds" in report  # what it is of, and the reference
        assert "Not done yet and left out: `late`: 0, 1." in report
        printed = invoke("study", file, "--report-only", "--arm", "none", code=1)
        assert "'none' is not an arm of this study: uniform, depth, late" in printed

    def test_a_file_that_holds_no_scores_is_refused(self, world, done, tmp_path):
        content = document(world, tmp_path / "out")
        (tmp_path / "out").mkdir()
        shutil.copy(world / "shapes" / "dev.parquet", tmp_path / "out" / "trials.parquet")
        printed = invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert "trials.parquet does not hold scores of a study" in printed.replace("\n", " ")

    def test_without_scoring_runs_are_only_trained(self, world, tmp_path):
        content = document(world, tmp_path / "out", seeds=[0])
        del content["scoring"], content["tuning"]
        file = write(tmp_path / "study.yaml", content)
        assert str(tmp_path / "out" / "runs" / "depth" / "seed-0") in invoke("study", file)
        assert load_run(tmp_path / "out" / "runs" / "depth" / "seed-0").step == 4
        assert "study: 2 runs, to do: 0" in invoke("study", file)
        assert "no scoring, so there is no report" in invoke("study", file, "--report-only", code=1)
        content["arms"]["late"] = {"of": "depth"}
        printed = invoke("study", write(tmp_path / "other.yaml", content), code=1)
        assert "in a study without scoring" in printed

    @pytest.mark.usefixtures("undrawn")
    def test_a_run_that_fails_is_named_and_the_others_are_done(self, world, tmp_path):
        content = document(world, tmp_path / "out")
        del content["tuning"]
        content["arms"]["wild"] = {"routing.strategy": "uniform", "optimizer.muon_lr": 1e30}
        printed = invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert "2 of 6 runs failed; the others are done" in printed
        assert "wild/seed-0: FloatingPointError" in printed.replace("\n", "")
        assert len([*(tmp_path / "out").rglob("judged.parquet")]) == 4


def test_scores_of_each_image_add_up_to_those_of_evaluate(world, done, tmp_path):
    run = load_run(shutil.copytree(done[1] / "runs" / "depth" / "seed-0", tmp_path / "run"))
    scoring = parse(Scoring, {**document(world, "")["scoring"], "images_per_caption": 2}, "")
    asked = read_captions(scoring.samples)
    rng = np.random.default_rng(0)
    images = np.stack([render(scene, rng) for scene in asked.scenes * 2])
    images[::3] = 0

    table = score_each_image(run, scoring, lambda latents: images, batch_size=64)
    score_run(run, scoring, lambda latents: images, batch_size=64, report=lambda line: None)

    entries = EvaluationReport.read(run.path).scores
    assert [*entries] == scoring.cfg_scales
    right = {}
    for row in table.to_pylist():
        key = row["cfg_scale"], row["split"], row["skill"]
        right.setdefault(key, []).append(row["right"])
    for cfg_scale, evaluation in entries.items():
        for row in evaluation.table.to_pylist():
            each = right.pop((cfg_scale, row["split"], row["skill"]))
            assert row["num_images"] == len(each)
            assert row["accuracy"] == pytest.approx(np.mean(each))
            if row["skill"] == "all":
                assert row["accuracy"] == pytest.approx(2 / 3)
    assert not right


class TestShipped:
    @pytest.mark.usefixtures("undrawn")
    def test_the_smallest_runs(self, world, tmp_path):
        """``studies/smoke.yaml`` with the tiny LLM's features, a few steps long."""
        changes = {
            "output": tmp_path / "out",
            "seeds": [0],
            "train.features": world / "train",
            "train.latents": world / "latents",
            "train.steps": 4,
            "train.checkpoint_every": 4,
            "train.log_every": 4,
            "scoring.features": world / "test",
            "scoring.samples": world / "shapes" / "test.parquet",
            "scoring.num_steps": 2,
        }
        file = Path(__file__).parents[3] / "studies" / "smoke.yaml"
        invoke("study", file, *(f"{key}={value}" for key, value in changes.items()))
        table = pq.read_table(tmp_path / "out" / "results.parquet")
        assert {*table["arm"].to_pylist()} == {"uniform", "penultimate", "depth"}
        report = (tmp_path / "out" / "report.md").read_text()
        assert "3 arms x 1 seeds" in report
        assert "| chance |" in report


class TestAblate:
    def command(self, world, out, *runs):
        options = ["--features", world / "test", "--samples", world / "shapes" / "test.parquet"]
        return ["ablate", *runs, *options, "--num-steps", 2, "--out", out]

    @pytest.mark.slow
    def test_runs_are_scored_under_other_weights(self, world, done, tmp_path):
        runs = [done[1] / "runs" / "depth" / f"seed-{seed}" for seed in (0, 1)]
        printed = invoke(*self.command(world, tmp_path / "out", *runs), "--leave-one-out")
        assert f"{runs[1]}: as trained, 1/10" in printed
        table = pq.read_table(tmp_path / "out" / "results.parquet")
        swapped = ["mean over blocks", "blocks reversed", "uniform", "top 3 layers"]
        layers = [f"without layer {layer}" for layer in (1, 2, 3, 4)]
        expected = ["as trained", *swapped, "another run's", *layers]
        assert [*dict.fromkeys(table["arm"].to_pylist())] == expected
        assert set(table["seed"].to_pylist()) == {0, 1}
        report = (tmp_path / "out" / "report.md").read_text()
        assert "10 arms x 2 runs" in report
        for name in ("scores", "layers"):
            assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 0
            assert str(tmp_path / "out" / "figures" / f"{name}.png") in printed

    @pytest.mark.usefixtures("undrawn")
    @pytest.mark.slow
    def test_stored_scores_are_reused(self, world, done, tmp_path, kill_once):
        run, other = (done[1] / "runs" / "depth" / f"seed-{seed}" for seed in (0, 1))
        out, results = tmp_path / "out", tmp_path / "out" / "results.parquet"
        command = self.command(world, out, run)
        kill_once(results.exists, *command, "--leave-one-out")
        killed = pq.read_table(results)
        printed = invoke(*command, "--leave-one-out")
        known = {*killed["arm"].to_pylist()}
        assert 0 < printed.count("scored before") == len(known) < 9
        whole = pq.read_table(results)
        assert whole.slice(0, killed.num_rows).equals(killed)
        assert invoke(*command, "--leave-one-out").count("scored before") == 9
        # Fewer swaps: scores of the others stay where they are.
        assert invoke(*command).count("scored before") == 5
        assert pq.read_table(results).equals(whole)
        # Another network in its place, or other images of it.
        assert "scored before" not in invoke(*self.command(world, out, other))
        assert "scored before" not in invoke(*self.command(world, out, run), "--seed", 1)

    def test_weights_are_put_in_place_and_taken_back(self, done):
        run = load_run(done[1] / "runs" / "depth" / "seed-0")
        other = load_run(done[1] / "runs" / "depth" / "seed-1")
        alpha, given = (torch.from_numpy(each.weights()[0]) for each in (run, other))
        found = swaps(alpha, given, run.layers, leave_one_out=True)
        for name, weights in found.items():
            assert torch.allclose(weights.sum(1), torch.ones(2)), name
            with swapped_weights(run, weights):
                assert torch.equal(torch.from_numpy(run.weights()[0]), weights)
        assert torch.equal(torch.from_numpy(run.weights()[0]), alpha)
        assert torch.equal(found["blocks reversed"], alpha[[1, 0]])
        assert torch.equal(found["mean over blocks"][0], alpha.mean(0))
        assert ((found["top 3 layers"] > 0).sum(1) == 3).all()
        assert (found["without layer 3"][:, 2] == 0).all()

    def test_swaps_that_change_nothing_are_left_out(self):
        alpha = torch.full((3, 4), 0.25)
        named = swaps(alpha, None, [1, 2, 3, 4], leave_one_out=False)
        assert list(named) == ["as trained", "top 3 layers"]

    def test_no_block_is_left_without_a_layer(self):
        alpha = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
        named = swaps(alpha, None, [1, 2, 3], leave_one_out=True)
        assert {name for name in named if "without" in name} == {
            "without layer 2",
            "without layer 3",
        }
        assert all(weights.isfinite().all() for weights in named.values())

    @pytest.mark.slow
    def test_refuses_runs_that_cannot_be_compared(self, world, done, tmp_path):
        run = done[1] / "runs" / "depth" / "seed-0"
        content = document(world, tmp_path / "out")
        arms = {"uniform": {}, "token": {"routing.strategy": "token"}}
        arms["top"] = {"routing.strategy": "depth", "routing.top_k": 2}
        arms["time"] = {"routing.strategy": "time"}
        arms["deep"] = {"routing.strategy": "depth", "model.depth": 3}
        content |= {"arms": arms, "seeds": [0]}
        del content["tuning"]
        invoke("study", write(tmp_path / "study.yaml", content))
        runs = tmp_path / "out" / "runs"
        printed = invoke(*self.command(world, tmp_path / "a", runs / "token" / "seed-0"), code=1)
        assert "strategy token has no one set of weights" in printed
        printed = invoke(
            *self.command(world, tmp_path / "a", run, runs / "time" / "seed-0"), code=1
        )
        assert "compare runs of one arm" in printed
        printed = invoke(
            *self.command(world, tmp_path / "a", run, runs / "deep" / "seed-0"), code=1
        )
        assert "compare runs of one arm" in printed
        assert not (tmp_path / "a").exists()
        invoke(*self.command(world, tmp_path / "a", runs / "time" / "seed-0"))
        table = pq.read_table(tmp_path / "a" / "results.parquet")
        swapped = {*table["arm"].to_pylist()}
        assert "mean over t" in swapped
        assert not {"blocks reversed", "mean over blocks"} & swapped
        # Of four layers some are read by no block, and cannot be left out.
        top = runs / "top" / "seed-0"
        invoke(*self.command(world, tmp_path / "b", top), "--leave-one-out")
        arms = {*pq.read_table(tmp_path / "b" / "results.parquet")["arm"].to_pylist()}
        assert 0 < len([arm for arm in arms if arm.startswith("without layer")]) < 4
        assert (tmp_path / "b" / "figures" / "layers.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("visible", "num", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("4,5, 6", 3, ["4", "5", "6"]),
        ("GPU-1f,MIG-2a", 2, ["GPU-1f", "MIG-2a"]),
        ("3,99", 1, ["3"]),  # CUDA ends its list at a GPU that is not there
        ("", 0, []),
    ],
)
def test_each_process_takes_one_of_the_visible_gpus(monkeypatch, visible, num, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
    assert visible_gpus() == expected


class TestConfiguration:
    def refused(self, world, message, **changes):
        with pytest.raises(InputError, match=message):
            self.parse_all(document(world, Path("out"), **changes))

    def parse_all(self, content):
        study = parse(StudyConfig, content, "study.yaml")
        for arm in study.arms:
            study.run(study.arm(arm).of or arm, 0, "out")
            study.scoring_of(arm)
            study.tuning_of(arm)

    def test_refuses_what_cannot_be_compared(self, world):
        self.refused(world, "reference 'best' is not an arm: uniform, depth", reference="best")
        self.refused(world, "contain duplicates", seeds=[1, 1])
        self.refused(world, r"tuning.seeds shares \[7\] with seeds", seeds=[0, 7])
        self.refused(world, "names a folder", arms={"uniform": {}, "a/b": {}})
        own = {"uniform": {"tuning": {"key": "optimizer.lr"}}}
        self.refused(world, "arm uniform tunes optimizer.lr: give its values too", arms=own)
        own["uniform"]["tuning"]["values"] = [1e-3]
        message = "arm uniform, tuning is not valid:\n  values: List should have"
        self.refused(world, message, arms=own)

    @pytest.mark.parametrize(
        ("arm", "message"),
        [
            ({"of": "best"}, "arm late is of 'best', which is not an arm with its own runs"),
            ({"of": "later"}, "arm late is of 'later', which is not an arm with its own runs"),
            ({"of": "depth", "steps": 3}, "scores the runs of depth and trains nothing"),
            ({"against": "best"}, "arm late is against 'best', which is not another arm"),
            ({"against": "late"}, "arm late is against 'late', which is not another arm"),
            ({"seeds": [0, 5]}, r"seeds \[0, 5\], not all of which are"),
            ({"scoring": {"cfg_scales": [2.0]}}, "changes scoring.cfg_scales, by which all arms"),
            ({"scoring": {"sampler": "x"}}, "(?s)arm late, scoring.*sampler"),
        ],
    )
    def test_refuses_arms_that_are_not_clear(self, world, arm, message):
        arms = {"depth": {}, "later": {"of": "depth"}, "late": arm}
        self.refused(world, message, arms=arms, reference="depth")

    def test_refuses_to_choose_by_what_it_is_judged_by(self, world):
        content = document(world, Path("out"))
        content["tuning"]["scoring"] = content["scoring"]
        with pytest.raises(InputError, match="choose settings by other captions"):
            parse(StudyConfig, content, "study.yaml")

    def test_names_the_arm_that_is_wrong(self, world):
        arms = {"uniform": {}, "depth": {"routing.strategi": "depth"}}
        self.refused(world, "(?s)arm depth is not valid.*did you mean 'strategy'", arms=arms)
        self.refused(world, "arm uniform sets seed", arms={"uniform": {"seed": 3}})

    def test_an_arm_alone_is_scored_along_the_way(self, world):
        content = document(world, Path("out"), along=[2])
        content["arms"]["static"] = {"routing.strategy": "static", "against": "depth", "seeds": [1]}
        study = parse(StudyConfig, content, "study.yaml")
        assert study.arms["static-at-2"] == {
            "of": "static",
            "scoring": {"step": 2},
            "against": "depth-at-2",
            "seeds": [1],
        }
        assert "static" not in " ".join(study.only(["depth"]).arms)
        assert "static-at-2" in study.only(["static"]).arms

    @pytest.mark.parametrize(
        ("along", "message"),
        [
            ([3], "arm uniform-at-3 is scored at step 3, where its runs have no checkpoint"),
            (
                [6],
                "at step 6, where .* no checkpoint: they have 4 steps and a checkpoint every 2",
            ),
            ([2, 2], r"along \[2, 2\] contains duplicates"),
            ([0], "along.0: Input should be greater"),
        ],
    )
    def test_refuses_steps_that_runs_do_not_keep(self, world, tmp_path, along, message):
        content = document(world, tmp_path / "out", along=along)
        printed = invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert re.search(message, printed)
        assert not (tmp_path / "out").exists()

    def test_refuses_a_step_whose_checkpoint_is_removed(self, world, tmp_path):
        content = document(world, tmp_path / "out", along=[2])
        content["train"] = {**content["train"], "steps": 7, "keep_checkpoints": 3}
        printed = invoke("study", write(tmp_path / "study.yaml", content), code=1)
        assert "set keep_checkpoints to at least 4" in printed

    def test_refuses_before_any_run_is_begun(self, world, tmp_path):
        content = document(world, tmp_path / "out")
        content["scoring"]["samples"] = str(tmp_path / "nothing.parquet")
        assert "nothing.parquet" in invoke("study", write(tmp_path / "a.yaml", content), code=1)
        content = document(world, tmp_path / "out")
        content["train"]["latents"] = str(tmp_path / "nothing")
        assert "nothing" in invoke("study", write(tmp_path / "b.yaml", content), code=1)
        assert not (tmp_path / "out").exists()
        assert "no run of" in invoke("study", tmp_path / "a.yaml", "--report-only", code=1)
