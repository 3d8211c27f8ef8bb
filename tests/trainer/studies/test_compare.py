import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from damaged_tables import DAMAGES

import semroute
from semroute.cli import cli
from semroute.schemas import InputError
from semroute.trainer.evaluation.shapes import IMAGE_SCORES_SCHEMA
from semroute.trainer.runs.scores import EVALUATION_SCHEMA, Evaluation, EvaluationReport
from semroute.trainer.studies.job import SCORES
from semroute.trainer.training.train import train


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(configure, tmp_path_factory):
    """Folder of three runs: one validated and evaluated, one scored by a study, one just begun."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, strategy, **changes):
        routing = {"strategy": strategy}
        return train(configure(folder / name, log_every=2, routing=routing, **changes))

    depth = run("depth", "depth", validation={"share": 0.1, "every": 2, "num_samples": 8})
    row = {"split": "test", "skill": "all", "accuracy": 0.625, "low": 0.5, "high": 0.7}
    row |= {"chance": 0.0, "num_images": 8, "num_scenes": 8}
    evaluation = Evaluation(pa.Table.from_pylist([row], schema=EVALUATION_SCHEMA))
    EvaluationReport(4, "ema", "features", 50, 0, {3.0: evaluation}).write(depth)
    uniform = run("arms/uniform", "uniform", optimizer={"lr": 1e-3}, keep_checkpoints=1)
    scores = [(3.0, n, 0, "test", "all", n < 3, 1, 1) for n in range(4)]
    scores += [(3.0, n, 0, "test", "colour", True, 1, 1) for n in range(4)]
    columns = [[*column] for column in zip(*scores, strict=True)]
    pq.write_table(pa.table(columns, schema=IMAGE_SCORES_SCHEMA), uniform / SCORES)
    begun = run("begun", "static", steps=1)
    (begun / "metrics.jsonl").write_text("")
    return folder


class TestCompare:
    def test_tables_what_differs_and_what_came_out(self, runs):
        found = semroute.compare([runs / "depth", runs / "arms" / "uniform", str(runs / "begun")])
        assert found.table["run"].to_pylist() == ["depth", "arms/uniform", "begun"]
        assert found.table["strategy"].to_pylist() == ["depth", "uniform", "static"]
        assert found.table.column_names == [
            "run",
            "strategy",
            "steps",
            "optimizer.lr",
            "validation.share",
            "validation.num_samples",
            "step",
            "loss",
            "validation",
            "test at 3",
            "entropy",
            "samples/s",
        ]
        assert found.table["optimizer.lr"].to_pylist() == [1e-4, 1e-3, 1e-4]
        assert found.table["test at 3"].to_pylist() == [0.625, 0.75, None]
        assert found.table["loss"].to_pylist()[2] is None
        assert found.table["step"].to_pylist() == [4, 4, 0]
        assert found.table["entropy"].to_pylist()[1] == pytest.approx(1)
        lines = str(found).split("\n")
        assert len(lines) == 4
        assert re.match(r"arms/uniform +uniform .* 0\.75 ", lines[2])

    def test_text_and_html_say_the_same(self, runs):
        found = semroute.compare([runs / "depth", runs / "begun"])
        cells = re.findall(r"<t[dh]>(.*?)</t[dh]>", found._repr_html_())
        assert [cell for line in str(found).split("\n") for cell in re.split("  +", line)] == cells

    def test_figures(self, runs):
        found = semroute.compare([runs / "depth", runs / "arms" / "uniform", runs / "begun"])
        figures = found.figures()
        assert [*figures] == ["curves", "by-t", "routing"]
        assert [axes.get_ylabel() for axes in figures["curves"].axes] == [
            "training loss",
            "loss on held-out samples",
            "entropy of routing weights",
        ]
        assert [len(axes.lines) for axes in figures["curves"].axes] == [2, 1, 2]
        assert figures["by-t"].axes[0].lines[0].get_xdata().tolist() == [*np.arange(1, 16, 2) / 16]
        titles = [axes.get_title() for axes in figures["routing"].axes[:3]]
        assert titles == ["depth", "arms/uniform", "begun"]
        unmeasured = semroute.compare([runs / "arms" / "uniform"]).figures()
        assert [*unmeasured] == ["curves", "routing"]
        assert [*semroute.compare([runs / "begun"]).figures()] == ["routing"]

    def test_refusals(self, runs):
        with pytest.raises(InputError, match="found 2 runs, 1 of them different"):
            semroute.compare([runs / "depth", runs / "depth"])
        with pytest.raises(InputError, match=r"is no run: it has no run\.json"):
            semroute.compare([runs / "depth", runs])

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_refuses_damaged_scores(self, runs, damage, tmp_path):
        run = shutil.copytree(runs / "arms" / "uniform", tmp_path / "run")
        DAMAGES[damage](run / SCORES, pq.read_table(run / SCORES))
        with pytest.raises(InputError, match=r"judged\.parquet does not hold scores of a study"):
            semroute.compare([run, runs / "begun"]).to_text()

    def test_the_command_prints_and_writes_a_page(self, runs, tmp_path):
        paths = [str(runs / "depth"), str(runs / "begun")]
        page = tmp_path / "page.html"
        done = CliRunner().invoke(cli, ["compare", *paths, "--html", str(page)])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("run ")
        text = page.read_text()
        assert text.count("data:image/png") == 3
        assert "http" not in text
        done = CliRunner().invoke(cli, ["compare", *paths, "--json"])
        assert [row["run"] for row in json.loads(done.stdout)] == ["depth", "begun"]
