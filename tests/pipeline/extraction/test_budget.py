"""Stores with a disk budget: extraction follows runs, and runs wait for it."""

import json
import random
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from benchmark_module import benchmark_module  # noqa: E402

from semroute.cli import cli  # noqa: E402
from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.store.open import open_features  # noqa: E402
from semroute.pipeline.store.verify import repair, verify  # noqa: E402
from semroute.schemas import InputError, TrainConfig, read_config  # noqa: E402
from semroute.trainer.runs.checkpoint import latest_checkpoint  # noqa: E402
from semroute.trainer.training.train import train  # noqa: E402

SHARD_BYTES = 60_000
Watch, folder_files = (
    getattr(benchmark_module("budget"), name) for name in ("Watch", "folder_files")
)
NUM_STEPS = 54


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(tiny_llm):
    return {"model": str(tiny_llm), "codec": "bf16", "workers": 0, "shard_bytes": SHARD_BYTES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, samples_file, tiny_llm):
    """A complete store of many small shards; read only."""
    path = tmp_path_factory.mktemp("whole") / "features"
    extract(str(samples_file), path, report=_silent, **options(tiny_llm))
    return path


def _silent(_line):
    pass


def document(features, latents, output, **data):
    return {
        **{"features": str(features), "latents": str(latents), "output": str(output)},
        **{"steps": NUM_STEPS, "mixed_precision": "no", "checkpoint_every": 7, "log_every": 10},
        "model": {"size": "nano", "depth": 1, "patch_size": 4},
        "data": {"batch_size": 8, "order": "shards", "window": 2, "prefetch": 2, **data},
    }


@pytest.fixture
def write_run(tmp_path, latent_store):
    """Name of a run in ``tmp_path`` -> its YAML file, for the store ``tmp_path / features``."""

    def write(name="run", **changes):
        data = changes.pop("data", {})
        found = document(tmp_path / "features", latent_store, tmp_path / name, **data) | changes
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(found))
        return file

    return write


@pytest.fixture(scope="module")
def expected(tmp_path_factory, whole, latent_store):
    """Weights of a run from the complete store."""
    output = tmp_path_factory.mktemp("expected") / "run"
    config = TrainConfig.model_validate(document(whole, latent_store, output))
    return weights(train(config, progress=False))


def weights(run):
    checkpoint = latest_checkpoint(Path(run))
    assert checkpoint.step == NUM_STEPS
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in getattr(checkpoint, kind)().items()
    }


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@contextmanager
def extracting(samples_file, tiny_llm, features, budget, *runs):
    """Extraction in a thread; its error is raised at the end of the block."""
    lines, errors = [], []

    def work():
        try:
            extract(
                str(samples_file),
                features,
                budget=budget,
                runs=runs,
                report=lines.append,
                **options(tiny_llm),
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)  # a test that fails does not wait for it
    thread.start()
    wait_for(lambda: errors or _follows(features, len(runs)))
    if errors:
        raise errors[0]
    yield lines
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def _follows(features, num):
    try:
        return len(json.loads((features / "budget.json").read_text())["runs"]) == num
    except FileNotFoundError:
        return False


def wait_for(ready, seconds=60):
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def output(*arguments):
    """What a command prints that succeeds."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def budget(whole):
    """Half of the shards, and what is beside them."""
    shards = sum(f.stat().st_size for f in whole.glob("hidden.zarr/hidden/c/*/0/0"))
    return sum(folder_files(whole).values()) - shards + shards // 2 + 20_000


def test_a_run_is_trained_to_the_same_bits(
    tmp_path, samples_file, tiny_llm, whole, budget, expected, write_run
):
    features, watch = tmp_path / "features", Watch(tmp_path / "features")
    file = write_run()
    with (
        watch.watching(),
        extracting(samples_file, tiny_llm, features, budget, file) as lines,
    ):
        run = train(read_config(file), progress=False)
    assert_same_bits(weights(run), expected)
    assert budget / 2 < watch.most <= budget
    assert "all runs" in lines[-1]
    written_again = int(lines[-1].split("shards were written, ")[1].split()[0])
    assert written_again > 0
    check_everything_else(features, whole, samples_file, tiny_llm)


def check_everything_else(features, whole, samples_file, tiny_llm):
    """What can be done with a store of which some shards are evicted."""
    store = open_features(features, complete=False)
    evicted = store.remaining()
    assert store.has_budget
    assert evicted
    assert len(store.receipts()) == store.manifest.layout.num_shards
    with pytest.raises(InputError, match="without --budget"):
        open_features(features)
    shared = yaml.safe_load(features.with_name("run.yaml").read_text())
    del shared["output"]
    study = {"arms": {"uniform": {}}, "reference": "uniform", "seeds": [0], "train": shared}
    study_file = features.with_name("study.yaml")
    study_file.write_text(yaml.safe_dump(study | {"output": str(features.with_name("study"))}))
    for command in (
        ("rewrite", features, f"{features}-2"),
        ("push", features, "me/features"),
        ("study", study_file),
    ):
        result = invoke(*command)
        assert result.exit_code
        assert "has a disk budget" in result.output
    assert "shards on disk" in invoke("inspect", features).output
    found = verify(features)
    assert (found.problems, found.unfinished, found.evicted) == ([], [], evicted)
    assert f"evicted: {len(evicted)} shards" in str(found)
    there = next(s for s in range(store.manifest.layout.num_shards) if s not in evicted)
    damaged = features / "hidden.zarr" / "hidden" / "c" / str(there) / "0" / "0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert repair(verify(features)) == [there]
    assert verify(features).evicted == sorted([*evicted, there])
    # Without a budget the same command completes the store, to the bytes of one that never had one.
    completed = extract(str(samples_file), features, report=_silent, **options(tiny_llm))
    assert completed.is_complete
    assert not verify(features).problems
    for file in whole.glob("hidden.zarr/hidden/c/*/0/0"):
        assert (features / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_several_runs_follow_one_store(
    tmp_path, samples_file, tiny_llm, budget, expected, write_run, start_command
):
    features = tmp_path / "features"
    files = [write_run("first"), write_run("second", seed=5), write_run("third")]
    with extracting(samples_file, tiny_llm, features, budget, *files):
        trained = [start_command("train", file) for file in files[:2]]
        for name, process in zip(("first", "second"), trained, strict=True):
            process.wait_until((tmp_path / name / "position.json").exists)
        # The third has not begun, so the others come only so far.
        third = str(tmp_path / "third")
        status = ["status", features, "--json"]
        wait_for(lambda: json.loads(output(*status)).get("waits_for") == third)
        assert third in invoke("status", features).output.split("waits for")[1]
        assert "waits for" in output("status", tmp_path / "first")
        train(read_config(files[2]), progress=False)
        for process in trained:
            assert process.wait() == 0, process.output.read_text()
    assert_same_bits(weights(tmp_path / "first"), expected)
    assert_same_bits(weights(tmp_path / "third"), expected)
    weights(tmp_path / "second")


def test_what_cannot_be_followed_is_refused(
    tmp_path, samples_file, tiny_llm, budget, write_run, latent_store
):
    features = tmp_path / "features"

    def refused(match, *runs, budget=budget, **changes):
        with pytest.raises(InputError, match=match):
            extract(
                str(samples_file),
                features,
                **options(tiny_llm) | {"budget": budget, "runs": runs, **changes},
                report=_silent,
            )

    refused("--budget needs --for")
    refused("--for needs --budget", write_run(), budget=None)
    refused("data.order=shards", write_run("random", data={"order": "random", "window": 16}))
    refused("not .*features", write_run("other", features=str(tmp_path / "others")))
    refused("the same output", write_run(), write_run())
    assert not features.exists()
    refused("smaller data.window", write_run(), budget=100_000)
    refused("smaller data.window", write_run("wide", data={"window": 100}))
    refused("validation samples", write_run("validated", validation={"share": 0.5}))
    with pytest.raises(InputError, match="follows no run"):
        train(read_config(write_run()), progress=False)


def test_other_bytes_are_refused(tmp_path, samples_file, tiny_llm, budget, write_run):
    features, file = tmp_path / "features", write_run()
    with extracting(samples_file, tiny_llm, features, budget, file):
        train(read_config(file), progress=False)
    evicted = open_features(features, complete=False).remaining()
    for shard in evicted:  # as if it had been encoded on another device
        receipt = features / "receipts" / f"shard-{shard:06d}.json"
        found = json.loads(receipt.read_text())
        found["files"][f"hidden.zarr/hidden/c/{shard}/0/0"]["sha256"] = "0" * 64
        receipt.write_text(json.dumps(found))
    shutil.rmtree(tmp_path / "run")
    with (
        pytest.raises(InputError, match="encoded to other bytes"),
        extracting(samples_file, tiny_llm, features, budget, file),
    ):
        pass


def test_kills_on_both_sides_change_nothing(
    tmp_path, samples_file, tiny_llm, budget, expected, write_run, start_command
):
    features, file = tmp_path / "features", write_run()
    common = ["--model", tiny_llm, "--codec", "bf16", "--workers", 0, "--shard-size", SHARD_BYTES]
    commands = {
        "extract": ["extract", samples_file, features, *common, "--budget", budget, "--for", file],
        "train": ["train", file],
    }
    rng, watch = random.Random(0), Watch(features)
    running = {"extract": start_command(*commands["extract"])}
    wait_for(lambda: _follows(features, 1))
    running["train"] = start_command(*commands["train"])
    progress = tmp_path / "run" / "position.json"
    with watch.watching():
        for turn in range(4):
            name = ("train", "extract")[turn % 2]
            wait_for(lambda: progress.exists() or running["train"].poll() is not None)
            time.sleep(rng.uniform(0.1, 0.6))
            running[name].kill()
            running[name] = start_command(*commands[name])
        assert running["train"].wait() == 0, running["train"].output.read_text()
        assert running["extract"].wait() == 0, running["extract"].output.read_text()
    assert_same_bits(weights(tmp_path / "run"), expected)
    assert watch.most_held <= budget
    assert not verify(features).problems
