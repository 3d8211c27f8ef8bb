"""The whole path at its smallest, through the command line and real files; and bad input."""

import inspect
import json
import re
import shlex
import shutil

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file, save_file

from semroute.cli import cli
from semroute.pipeline.commands.options import FINITE_FLOAT, SEED
from semroute.schemas import InputError, read_config
from semroute.schemas.verbosity import speaks


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
        return result.output
    return result.stdout


CONFIG = {
    "seed": 1,
    "steps": 6,
    "mixed_precision": "no",
    "log_every": 2,
    "checkpoint_every": 3,
    "model": {"size": "nano", "depth": 2, "width": 32, "patch_size": 6},
    "flow": {"prediction": "x0", "shift": 1.0},
    "optimizer": {"name": "muon"},
    "data": {"batch_size": 4, "noise_draws": 2},
    "ema": {"every": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llm):
    """Everything up to a trained run, each step made by its command."""
    root = tmp_path_factory.mktemp("world")
    invoke("shapes", root / "shapes", "--num", 80, "--num-test", 12, "--seed", 3)
    for name in ("train", "test"):
        file = root / "shapes" / f"{name}.parquet"
        invoke("extract", file, root / name, "--model", tiny_llm, "--workers", 0)
    invoke("latents", root / "shapes" / "train.parquet", root / "latents", "--workers", 0)
    config = CONFIG | {
        "features": str(root / "train"),
        "latents": str(root / "latents"),
        "output": str(root / "run"),
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    output = invoke("train", root / "run.yaml")
    assert f"semroute plot {root / 'run'}" in output
    return root


@pytest.fixture(scope="module")
def timed(world):
    """A run whose routing depends on t."""
    run = world / "timed"
    invoke("train", world / "run.yaml", f"output={run}", "routing.strategy=time")
    return run


class TestClock:
    """Routing by t with each clock, and the lag that they measure."""

    def test_lag(self, world, timed):
        options = ["--features", world / "test", "--num", 3, "--num-steps", 4]
        output = invoke("lag", timed, *options, "--cfg-scale", 1, "--cfg-scale", 3)
        table = pyarrow.parquet.read_table(timed / "lag.parquet")
        assert table.num_rows == 2 * 2 * 3
        assert output.splitlines()[0].split() == [
            *("guidance", "solver", "lag", "largest", "as", "shift", "outside"),
        ]
        assert (timed / "figures" / "lag.png").stat().st_size > 0
        first = (timed / "clock.safetensors").read_bytes()
        assert invoke("lag", timed, *options, "--cfg-scale", 1, "--cfg-scale", 3) == output
        assert (timed / "clock.safetensors").read_bytes() == first

    def test_images_differ_by_clock_and_solver(self, world, timed, tmp_path):
        options = ["--features", world / "test", "--num", 1, "--num-steps", 4]
        found = set()
        for name in ("nominal", "shift:0.2", "estimated"):
            for solver in ("euler", "heun"):
                out = tmp_path / f"{name}-{solver}"
                clock = ["--clock", name, "--solver", solver]
                invoke("sample", timed, *options, *clock, "--out", out, "--weights", "model")
                found.add((out / "000000.png").read_bytes())
        assert len(found) >= 2  # after six steps, gates have learned very little

    def test_a_clock_is_refused_where_it_changes_nothing(self, world):
        options = ["--features", world / "test", "--clock", "estimated"]
        output = invoke("sample", world / "run", *options, code=1)
        assert "strategy depth does not depend on t, so clock estimated" in output

    @pytest.mark.parametrize("place", ["file/samples", "file/deep/samples"])
    def test_a_place_that_cannot_be_written_is_refused_first(self, world, tmp_path, place):
        (tmp_path / "file").touch()
        out = tmp_path / place
        options = ["--features", world / "test", "--num", 2, "--num-steps", 2, "--out", out]
        output = invoke("sample", world / "run", *options, code=1)
        assert f"Error: {tmp_path / 'file'}" in output
        assert "image/s" not in output  # no bar: nothing was generated


class TestVAE:
    """Latents of a VAE, from images to images."""

    def test_the_whole_path(self, world, tiny_vae, tmp_path):
        vae, run = shutil.copytree(tiny_vae("kl"), tmp_path / "vae"), tmp_path / "run"
        file = world / "shapes" / "train.parquet"
        invoke("latents", file, tmp_path / "latents", "--vae", vae, "--workers", 0)
        config = CONFIG | {
            "features": str(world / "train"),
            "latents": str(tmp_path / "latents"),
            "output": str(run),
            "model": CONFIG["model"] | {"patch_size": 3},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        invoke("train", tmp_path / "run.yaml", "steps=2")
        sample = ["sample", run, "--features", world / "test", "--num", 2, "--num-steps", 2]
        invoke(*sample)
        with Image.open(run / "samples" / "000000.png") as image:
            assert image.size == (18, 18)

        vae.rename(tmp_path / "elsewhere")
        output = CliRunner().invoke(cli, [*map(str, sample), "--out", str(tmp_path / "out")])
        assert output.exit_code == 0
        assert "Latents are written instead of images" in output.stderr
        latents = load_file(tmp_path / "out" / "latents.safetensors")["latents"]
        assert latents.shape == (2, 4, 9, 9)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["latents.safetensors"]

        invoke(*sample, "--out", tmp_path / "pictures", "--vae", tmp_path / "elsewhere")
        assert (tmp_path / "pictures" / "000001.png").exists()
        output = invoke(*sample, "--vae", tiny_vae("tiny"), code=1)
        assert "is not the VAE of these latents" in output
        options = ["--features", world / "test", "--samples", world / "shapes" / "test.parquet"]
        assert "no such folder" in invoke("evaluate", run, *options, code=1)

    def test_images_that_cannot_be_read_fail_the_command(self, world, tmp_path):
        table = pyarrow.parquet.read_table(world / "shapes" / "train.parquet")
        images = table["image"].to_pylist()
        images[3]["bytes"] = images[3]["bytes"][:60]
        kind = table.schema.field("image").type
        place = table.schema.get_field_index("image")
        table = table.set_column(place, "image", pa.array(images, kind))
        file = tmp_path / "broken.parquet"
        pyarrow.parquet.write_table(table, file)
        arguments = ["latents", file, tmp_path / "latents", "--workers", 0]
        output = invoke(*arguments, code=1)
        assert "1 of 80 images cannot be read" in output
        assert "sample 3: OSError" in output
        assert "80, 1 of them dropped" in invoke(*arguments, "--broken", "skip")


class TestPath:
    def test_inspect_speaks_text_and_json(self, world):
        assert "complete" in invoke("inspect", world / "train")
        details = json.loads(invoke("inspect", world / "latents", "--json"))
        assert details["status"] == "complete"

    def test_training_left_a_run(self, world):
        lines = (world / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
        checkpoints = sorted(p.name for p in (world / "run" / "checkpoints").iterdir())
        assert checkpoints == ["step-00000003", "step-00000006"]
        assert "unknown key" not in invoke("train", world / "run.yaml")

    @pytest.mark.parametrize(
        "strategy", ["penultimate", "uniform", "static", "time", "depth", "joint"]
    )
    def test_every_strategy_trains_samples_and_plots(self, world, tmp_path, strategy):
        run = tmp_path / "run"
        changes = [f"output={run}", f"routing.strategy={strategy}", "steps=2"]
        invoke("train", world / "run.yaml", *changes)
        options = ["--features", world / "test", "--num", 3, "--num-steps", 2]
        output = invoke("sample", run, *options, "--cfg-scale", 2)
        assert output.splitlines() == [
            str(run / "samples" / "grid.png"),
            str(run / "samples" / "captions.jsonl"),
        ]
        picture = np.asarray(Image.open(run / "samples" / "000002.png"))
        assert picture.shape == (18, 18, 3)
        names = {path.rpartition("/")[2] for path in invoke("plot", run).split()}
        expected = {"loss.png", "routing.png"}
        assert names == expected | (
            {"routing-over-time.png"} if strategy in "time joint" else set()
        )

    def test_new_prompts_give_the_images_of_stored_captions(self, world, tmp_path):
        """The first caption of the test set, once from the store and once encoded again."""
        caption = pyarrow.parquet.read_table(world / "shapes" / "test.parquet")["text"][0].as_py()
        options = ["--num-steps", 3, "--cfg-scale", 3]
        stored = ["--features", world / "test", "--num", 1, "--out", tmp_path / "stored"]
        invoke("sample", world / "run", *options, *stored)
        new = ["--prompt", caption, "--prompt", "a blue something", "--out", tmp_path / "new"]
        invoke("sample", world / "run", *options, *new)
        pictures = [
            np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int)
            for name in ("stored", "new")
        ]
        assert abs(pictures[0] - pictures[1]).max() <= 2
        assert (tmp_path / "new" / "000001.png").exists()

    def test_evaluate_prints_chance_and_plot_draws_it(self, world):
        options = ["--features", world / "test", "--samples", world / "shapes" / "test.parquet"]
        output = invoke("evaluate", world / "run", *options, "--num-steps", 2, "--cfg-scale", 1.5)
        assert "guidance 1.5, 12 images" in output
        assert "chance" in output
        document = json.loads((world / "run" / "evaluation.json").read_text())
        assert (document["step"], document["weights"], document["num_steps"]) == (6, "ema", 2)
        (entry,) = document["scores"]
        assert entry["cfg_scale"] == 1.5
        assert {row["split"] for row in entry["scores"]} == {"test", "held-out"}
        assert (world / "run" / "figures" / "judged-cfg-1.5.png").exists()
        assert "accuracy-cfg-1.5.png" in invoke("plot", world / "run")

    def test_mixes_of_a_run_are_sampled_evaluated_and_trained_from(self, world, tmp_path):
        for name in ("train", "test"):
            options = ["--routing", world / "run", "--rank", 2, "--workers", 0]
            output = invoke("rewrite", world / name, tmp_path / name, *options)
            assert "2 of these layers, for the blocks of a run with strategy depth" in output
        shapes = world / "shapes" / "test.parquet"
        options = ["--features", tmp_path / "test", "--num-steps", 2]
        invoke("sample", world / "run", *options, "--num", 2, "--out", tmp_path / "pictures")
        run = shutil.copytree(world / "run", tmp_path / "run")
        assert "12 images" in invoke("evaluate", run, *options, "--samples", shapes)
        interval = ["--cfg-interval", 0.2, 0.8, "--cfg-scale", 3]
        invoke("evaluate", run, *options, "--samples", shapes, *interval)
        assert json.loads((run / "evaluation.json").read_text())["cfg_interval"] == [0.2, 0.8]
        tuned = tmp_path / "tuned"
        changes = [f"features={tmp_path / 'train'}", "routing.strategy=mixes", f"start={run}"]
        invoke("train", world / "run.yaml", *changes, f"output={tuned}", "steps=2")
        invoke("sample", tuned, *options, "--num", 2)
        invoke("sample", tuned, "--prompt", "a red cup", "--num-steps", 2)
        assert "routing.png" in invoke("plot", tuned)

    def test_the_llm_of_new_prompts_must_be_the_runs(self, world, tiny_llm, tmp_path):
        other = shutil.copytree(tiny_llm, tmp_path / "other")
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        options = ["--prompt", "a", "--num-steps", 1]
        output = invoke("sample", world / "run", *options, "--model", other, code=1)
        assert "is not the LLM of the features" in output
        assert "model.files.model.safetensors" in output


class TestVerbosity:
    def test_every_command_can_say_less_or_more(self):
        for name, command in cli.commands.items():
            options = {option for each in command.params for option in each.opts}
            assert {"--quiet", "--verbose"} <= options, name

    def test_every_command_names_the_next_unless_it_is_the_last(self):
        def says_next(command):
            return "suggest(" in inspect.getsource(inspect.unwrap(command.callback))

        silent = {name for name, command in cli.commands.items() if not says_next(command)}
        # Results to look at or to use elsewhere; `train` names the next command in its result.
        last = {"ablate", "compare", "embed", "export", "lag", "plot", "probe", "push", "sample"}
        assert silent == last | {"study", "train"}

    def test_the_next_command_is_one(self, world, tmp_path, tiny_llm):
        file, features = world / "shapes" / "train.parquet", world / "train"
        commands = (
            ["shapes", tmp_path / "shapes", "--num", 80, "--num-test", 12],
            ["estimate", file, "--model", tiny_llm],
            ["inspect", features],
            ["status", features],
            ["rewrite", features, tmp_path / "smaller", "--codec", "bf16", "--workers", 0],
        )
        for command in commands:
            result = CliRunner().invoke(cli, [*map(str, command)])
            *_, line = result.stderr.splitlines()
            assert line.startswith("next: semroute "), result.output
            name, *arguments = shlex.split(line)[2:]
            cli.commands[name].make_context(name, arguments)

    def test_less_and_more_is_said(self, world):
        file = world / "shapes" / "train.parquet"
        arguments = ["latents", str(file), str(world / "latents"), "--workers", "0"]
        plain, quiet, verbose = (
            CliRunner().invoke(cli, [*arguments, *more]) for more in ([], ["-q"], ["-v"])
        )
        assert plain.stdout == quiet.stdout == verbose.stdout
        assert "captions from 'text'; images from 'image'" in plain.stderr
        assert plain.stderr.endswith(f"next: semroute inspect {world / 'latents'}\n")
        assert quiet.stderr == ""
        assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in verbose.stderr.splitlines())
        failing = ["latents", "nowhere.csv", str(world / "x"), "--workers", "0"]
        CliRunner().invoke(cli, ["latents", "-q", "--workers", "many"])
        assert speaks() == "normal"
        for more, is_traced in ((["-q"], False), ([], False), (["-v"], True)):
            result = CliRunner().invoke(cli, [*failing, *more])
            assert "nowhere.csv: no such file" in result.stderr
            assert ("Traceback" in result.stderr) == is_traced


class TestBadInput:
    """Bad input ends in one clear message and a non-zero exit code."""

    @pytest.fixture
    def extract(self, samples_file, tiny_llm, tmp_path):
        def run(source=samples_file, *options, model=tiny_llm):
            target = tmp_path / "features"
            arguments = [source, target, "--model", model, "--workers", 0, *options]
            return invoke("extract", *arguments, code=1)

        return run

    def test_caption_files(self, extract, tmp_path):
        assert "no such file" in extract(tmp_path / "missing.parquet")
        (tmp_path / "empty.txt").write_text("")
        assert "is empty; expected at least one row" in extract(tmp_path / "empty.txt")
        (tmp_path / "blank.txt").write_text("a cup\n\n \n")
        output = extract(tmp_path / "blank.txt")
        assert "2 of 3 rows have an empty caption" in output
        assert "(rows 1, 2, counted from 0)" in output
        (tmp_path / "c.csv").write_text("id,words\n1,a cup\n")
        assert "its columns are id, words" in extract(tmp_path / "c.csv")
        assert "no column 'nope'" in extract(tmp_path / "c.csv", "--text-column", "nope")
        assert not (tmp_path / "features").exists()

    def test_captions_that_changed(self, tiny_llm, tmp_path):
        file = tmp_path / "c.txt"
        arguments = [file, tmp_path / "f", "--model", tiny_llm, "--workers", 0]
        file.write_text("a cup\na tree\n")
        invoke("extract", *arguments)
        file.write_text("a cup\na bush\n")
        output = invoke("extract", *arguments, code=1)
        assert "row 1, counted from 0, is 'a bush'" in output
        assert "was made from 'a tree' there" in output
        assert "name a new folder" in output

    def test_models(self, extract, tmp_path):
        assert "no such folder or file, and not a hub id" in extract(model=tmp_path / "nope")
        assert "no config.json" in extract(model=tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
        save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
        assert "ResNetEncoder, the text tower of ResNetModel, is of no" in extract(model=tmp_path)

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--layers", "9", "no layer 9; the model has layers 0 to 4"),
            ("--layers", "most", "expected all, every:3, or numbers"),
            ("--template", "nope", "is neither a preset"),
            ("--max-length", "1", "leaves no token for the caption"),
        ],
    )
    def test_options(self, extract, samples_file, option, value, message):
        assert message in extract(samples_file, option, value)

    def test_features_of_another_model_are_refused(self, world, tmp_path, tiny_llm):
        target = tmp_path / "other"
        file = world / "shapes" / "test.parquet"
        options = ["--model", tiny_llm, "--workers", 0, "--layers", "1,2"]
        invoke("extract", file, target, *options)
        output = invoke("sample", world / "run", "--features", target, code=1)
        assert "was trained on other features" in output
        assert "layers: [1, 2] instead of [1, 2, 3, 4]" in output
        both = ["--features", target, "--samples", file]
        assert "trained on other features" in invoke("evaluate", world / "run", *both, code=1)

    def test_test_captions_of_another_file_are_refused(self, world):
        options = ["--features", world / "train", "--samples", world / "shapes" / "test.parquet"]
        output = invoke("evaluate", world / "run", *options, code=1)
        assert "the captions differ" in output

    def test_an_unfinished_store_is_refused_by_train(self, world, tmp_path):
        store = shutil.copytree(world / "train", tmp_path / "store")
        manifest = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
        shutil.rmtree(store / "receipts")
        changes = [f"features={store}", f"output={tmp_path / 'run'}"]
        output = invoke("train", world / "run.yaml", *changes, code=1)
        assert "is not finished: 1 of 1 shards" in output
        assert not (tmp_path / "run").exists()

    def test_stores_of_different_samples_are_refused_by_train(self, world, tmp_path, latent_store):
        changes = [f"latents={latent_store}", f"output={tmp_path / 'run'}"]
        output = invoke("train", world / "run.yaml", *changes, code=1)
        assert str(latent_store) in output

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'?"),
            ("routing.stategy=depth", "did you mean 'strategy'?"),
            ("steps=many", "steps: "),
            ("steps", "expected KEY=VALUE"),
            ("seed.x=1", "seed holds a value, not keys"),
            ("seed=[", "the value is no YAML"),
            ("model.patch_size=5", "not divisible by model.patch_size 5"),
        ],
    )
    def test_configurations(self, world, tmp_path, change, message):
        output = invoke("train", world / "run.yaml", f"output={tmp_path / 'r'}", change, code=1)
        assert message in output

    def test_configuration_files(self, tmp_path):
        assert "No such file" in invoke("train", tmp_path / "nope.yaml", code=1)
        (tmp_path / "c.yaml").write_text("[1, 2]")
        assert "holds list; expected keys" in invoke("train", tmp_path / "c.yaml", code=1)
        (tmp_path / "c.yaml").write_text("a: [")
        assert "is no YAML" in invoke("train", tmp_path / "c.yaml", code=1)

    def test_runs(self, world, tmp_path):
        for command in ("sample", "plot", "evaluate"):
            options = [] if command == "plot" else ["--features", world / "test"]
            if command == "evaluate":
                options += ["--samples", world / "shapes" / "test.parquet"]
            assert "is no run: it has no run.json" in invoke(command, tmp_path, *options, code=1)
        assert "either --features, --prompt or --prompts" in invoke("sample", world / "run", code=1)
        assert "no checkpoint of step 4" in invoke("plot", world / "run", "--step", 4, code=1)

    def test_a_world_is_not_written_over_another(self, world):
        output = invoke("shapes", world / "shapes", "--num", 80, "--num-test", 12, code=1)
        assert str(world / "shapes") in output


def test_numbers_in_overrides_are_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("{features: f, latents: l, output: o, optimizer: {lr: 1e-3}}")
    config = read_config(file, ["optimizer.router_lr=2e-3", "data.batch_size=8"])
    assert (config.optimizer.lr, config.optimizer.router_lr) == (1e-3, 2e-3)
    assert config.data.batch_size == 8
    with pytest.raises(InputError, match="features"):
        read_config(file, ["features=[1]"])


def test_sizes_are_refused_by_name(tmp_path):
    result = CliRunner().invoke(cli, ["latents", "x.parquet", str(tmp_path), "--shard-size", "big"])
    assert result.exit_code == 2
    assert "'big' is not a size; expected a number and a unit" in result.output


def options_of(kind):
    """Each option of a command whose type is of a kind."""
    return [
        pytest.param(name, option, id=f"{name}{option.opts[0]}")
        for name, command in sorted(cli.commands.items())
        for option in command.params
        if isinstance(option.type, kind)
    ]


def refused_value(command, option, value):
    """What is printed about a value of an option, with nothing else on the command line."""
    arguments = [command, *option.opts[:1], *[value] * option.nargs]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    return result.output


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(("command", "option"), options_of(click.types.FloatParamType))
def test_numbers_that_are_not_finite_are_refused_by_every_command(command, option, value):
    output = refused_value(command, option, value)
    assert f"Invalid value for '{option.opts[0]}': '{value}' is not a finite number" in output


def test_every_number_of_every_command_has_one_of_our_types():
    found = options_of(click.types.FloatParamType)
    assert len(found) >= 8
    kind = type(FINITE_FLOAT)
    assert [each.id for each in found if not isinstance(each.values[1].type, kind)] == []
    seeds = [
        option.type
        for command in cli.commands.values()
        for option in command.params
        if option.name in ("seed", "shuffle_layers")
    ]
    assert len(seeds) >= 7
    assert {*map(type, seeds)} == {type(SEED)}


@pytest.mark.parametrize("value", ["-1", str(2**63), str(10**30)])
@pytest.mark.parametrize(("command", "option"), options_of(type(SEED)))
def test_seeds_out_of_range_are_refused_by_every_command(command, option, value):
    assert f"'{value}' is not in the range from 0 to" in refused_value(command, option, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample run --features f --model m", "--model is not used with --features"),
        ("sample run --features f --prompts p --model m", "--model is not used with --features"),
        ("sample run --prompt p --layout geneval", "--layout needs --prompts"),
        ("study c.yaml --report-only --jobs 2", "--jobs is not used with --report-only"),
        ("rewrite f out --text-column c", "--text-column is about a table: name it with"),
        ("probe f labels --routing run", "--routing is for the figure"),
        ("evaluate run --question q", "--question needs --judge"),
    ],
)
def test_options_without_effect_are_refused(arguments, message):
    assert message in invoke(*arguments.split(), code=1)


def test_a_size_of_very_many_digits_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["latents", "x", str(tmp_path), "--shard-size", "9" * 400])
    assert result.exit_code == 2
    assert "is not a size" in result.output


def test_several_captions_a_sample_are_stored_and_joined(tiny_llm, tmp_path):
    table = pa.table({"caption": [["one", "two"], ["two"]]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    options = ["--model", tiny_llm, "--workers", 0]
    output = invoke("extract", tmp_path / "c.parquet", tmp_path / "f", *options)
    assert "3 unique (the null caption included) of 2 samples" in output


@pytest.mark.slow
def test_a_full_disk_is_one_message_for_every_command(world, timed, tmp_path, start_command):
    """A limit on the size of files stands in for a full disk."""
    config, run = world / "run.yaml", tmp_path / "run"
    done = world / "run"
    for limit, arguments in (
        (10_000, ["shapes", tmp_path / "shapes", "--num", 4000]),
        (200_000, ["train", config, f"output={run}"]),
        (5_000, ["export", done, tmp_path / "pipeline"]),
        (1_000, ["export", done, tmp_path / "router", "--router"]),
        (5_000, ["plot", done, "--out", tmp_path / "plots"]),
        (1_000, ["sample", done, "--features", world / "test", "--out", tmp_path / "samples"]),
        (5_000, ["inspect", world / "test", "--html", tmp_path / "page.html"]),
        (5_000, ["compare", done, timed, "--html", tmp_path / "page.html"]),
        (5_000, ["rewrite", world / "test", tmp_path / "rewritten", "--codec", "delta"]),
    ):
        process = start_command(*arguments, max_file_bytes=limit)
        printed = (process.wait(), process.output.read_text())
        assert printed[0] == 1, (arguments, printed)
        assert "Free some space and rerun the same command" in printed[1], arguments
        assert "Traceback" not in printed[1]
    invoke("train", config, f"output={run}")  # with space again, it resumes
