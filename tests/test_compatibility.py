"""What earlier versions wrote: opened, verified, read, grown and continued by this one.

``tests/data/VERSION`` was written by that version (``tests/data/write.py``) and never changes. The
tests go through public names and commands alone, and issue the very commands that made the data.
Hidden states, latents and gradients differ in their last bits between processors, so what is
computed again is compared within a tolerance everywhere, and to the byte where this machine
computes what the writer's did (``same_machine``).
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import semroute
from semroute.cli import cli

DATA = Path(__file__).parent / "data"
CODECS = ["bf16", "lossless", "delta", "linear"]
FEATURES = [*CODECS, "mixes"]
LATENTS = ["latents", "buckets"]
EXACT = ["bf16", "lossless", "delta", "mixes"]  # linear multiplies matrices to decode
ERRORS = {"bf16": 1e-2, "lossless": 1e-2, "delta": 0.1, "linear": 0.1, "mixes": 1e-2}
"""Of a vector at most: rounding to bfloat16, and the codec's own."""
SHARD = 1
LIMIT = 24


def _load_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write", DATA / "write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write = _load_writer()


def invoke(*command, code=0):
    result = CliRunner().invoke(cli, [str(part) for part in command])
    assert result.exit_code == code, result.output
    return result.stdout


@pytest.fixture(params=sorted(path.parent.name for path in DATA.glob("*/made.json")))
def data(request, tmp_path, monkeypatch):
    """A copy of a version's folder to work in: paths in commands are relative to it."""
    folder = shutil.copytree(DATA / request.param, tmp_path / "data")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def made(data):
    return json.loads((data / "made.json").read_text())


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.fixture
def same_machine(torch, made):
    """Whether the libraries compute here, without semroute, what they did where it was written."""
    pytest.importorskip("diffusers")
    return write.probe(Path()) == made["probe"]


def is_intact(store, unfinished=()):
    """Every byte of a store as it was written, and nothing that was not."""
    found = json.loads(invoke("verify", store, "--json"))
    assert found["problems"] == []
    assert found["warnings"] == []
    assert found["unfinished"] == list(unfinished)
    return found["bytes"] > 0


def relative_errors(found, expected):
    """Of vectors, the last axis."""
    assert found.shape == expected.shape
    norm = np.linalg.norm
    return norm(found - expected, axis=-1) / norm(expected, axis=-1)


def numbers(bits):
    """Of bfloat16: float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def compare_hidden(found, expected):
    """Largest relative error of a vector, by text; both hold the same texts."""
    assert found.keys() == expected.keys()
    pairs = [(numbers(found[text]), numbers(expected[text])) for text in expected]
    return max(relative_errors(*pair).max() for pair in pairs)


def shards(store):
    """Files of a shard, and receipts, with what they hold."""
    files = [*Path(store).glob("*.zarr/*/c/**/*"), *Path(store).glob("receipts/*")]
    return {file: file.read_bytes() for file in files if file.is_file()}


def lose(store, shard):
    """Make of a store what a killed command leaves: a shard is not written."""
    receipt = Path(store, "receipts", f"shard-{shard:06d}.json")
    for name in json.loads(receipt.read_text())["files"]:
        Path(store, name).unlink()
    receipt.unlink()
    path = Path(store, "manifest.json")
    manifest = path.read_text().replace('"status": "complete"', '"status": "extracting"')
    path.write_text(re.sub(r'"dropped": \[[^]]*\]', '"dropped": []', manifest))


def receipts(store):
    """Without times and workers, and so without their checksums."""
    found = {file.name: json.loads(file.read_text()) for file in Path(store).glob("receipts/*")}
    for receipt in found.values():
        for name in ("seconds", "worker", "sha256"):
            del receipt[name]
    return found


def without_limit(command):
    place = command.index("--limit")
    return [*command[:place], *command[place + 2 :]]


def test_the_first_version_is_there():
    assert (DATA / "0.1.0" / "made.json").exists()


def test_bytes_of_what_is_computed_can_be_compared(same_machine):
    if not same_machine:
        pytest.skip("this machine computes other last bits than the one that wrote the data")


class TestReading:
    """Needs no torch."""

    @pytest.mark.parametrize("store", [*FEATURES, *LATENTS])
    def test_every_byte_is_verified(self, data, store):
        assert is_intact(store)
        (file, *_) = sorted(shards(store))
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
        invoke("verify", store, code=1)

    @pytest.mark.parametrize("store", FEATURES)
    def test_features_are_read_as_they_were(self, data, made, store):
        found, expected = write.describe_features(store), made["features"][store]
        if store not in EXACT:
            del found["hidden"], expected["hidden"]
            features = semroute.open_features(store)
            bits = features.read(range(len(features))).bits
            errors = relative_errors(numbers(bits), numbers(np.load(f"expected/{store}.npy")))
            assert errors.max() < 5e-3
            assert errors.mean() < 1e-4
        assert found == expected
        features = semroute.open_features(store)
        some, last = features.read([5, 3, 5], layers=features.layers[-1:]), features[3].hidden
        rows = slice(some.offsets[1], some.offsets[2])
        np.testing.assert_array_equal(numbers(some.bits[rows]), last[:, -1:])

    @pytest.mark.parametrize("store", CODECS)
    def test_codecs_hold_the_same(self, data, store):
        found, expected = write.hidden_by_text(store), write.hidden_by_text("bf16")
        assert compare_hidden(found, expected) < ERRORS[store]

    @pytest.mark.parametrize("store", LATENTS)
    def test_latents_are_read_as_they_were(self, data, made, store):
        found = write.read_latents(store, 0, LIMIT)
        assert {key: write.digest(each) for key, each in found.items()} == made["latents"][store]
        latents = semroute.open_latents(store)
        assert latents.has_deviation == (store == "latents")
        assert [*latents.ids] == [row for row in range(LIMIT) if row != 9]

    def test_half_a_store_is_told_from_a_whole_one(self, data):
        assert is_intact("interrupted", unfinished=[SHARD])
        with pytest.raises(ValueError, match="not finished: 1 of 2 shards"):
            semroute.open_features("interrupted")
        with pytest.raises(ValueError, match="no feature store"):
            semroute.open_features("latents")

    @pytest.mark.parametrize("store", [*FEATURES, *LATENTS, "interrupted"])
    def test_what_is_said_of_a_store(self, data, store):
        manifest = json.loads(Path(store, "manifest.json").read_text())
        found = json.loads(invoke("inspect", store, "--json"))
        assert found["manifest"] == manifest
        assert json.loads(invoke("status", store, "--json"))


class TestGrowing:
    @pytest.mark.parametrize("store", CODECS)
    def test_features_grow(self, torch, data, made, same_machine, store):
        before, old = shards(store), write.hidden_by_text(store)
        generations = json.loads(Path(store, "manifest.json").read_text())["grown_from"]
        invoke(*without_limit(made["commands"][store]))
        after = shards(store)
        assert {file: after[file] for file in before} == before
        assert len(after) > len(before)
        assert is_intact(store)
        grown = semroute.open_features(store)
        assert len(grown.manifest.grown_from) == len(generations) + 1
        captions = write.describe_features(store, len(old))["captions"]
        assert captions == made["features"][store]["captions"]
        new = write.hidden_by_text(store)
        if store in EXACT:
            for text, bits in old.items():
                np.testing.assert_array_equal(new[text], bits)
        with np.load("expected/grown.npz") as expected:
            assert len(expected) > len(old)
            assert compare_hidden(new, expected) < ERRORS[store]
        texts = grown.captions["text"].to_pylist()
        table = pq.read_table("samples.parquet")["text"].to_pylist()
        assert [
            [texts[caption] for caption in row] for row in grown.samples["caption_ids"].to_pylist()
        ] == table
        if same_machine:
            assert write.contents(Path(store)) == made["grown"][store]

    @pytest.mark.parametrize("store", LATENTS)
    def test_latents_grow(self, torch, data, made, same_machine, store):
        before, old = shards(store), write.read_latents(store, 0, LIMIT)
        invoke(*without_limit(made["commands"][store]))
        after = shards(store)
        assert {file: after[file] for file in before} == before
        assert is_intact(store)
        for name, latents in write.read_latents(store, 0, LIMIT).items():
            np.testing.assert_array_equal(latents, old[name])
        assert [*semroute.open_latents(store).ids] == [row for row in range(32) if row != 9]
        if store == "latents":
            new = write.read_latents(store, LIMIT, 32)
            with np.load("expected/latents.npz") as expected:
                assert {*new} == {*expected}
                for name, latents in new.items():
                    np.testing.assert_allclose(latents, expected[name], atol=2e-2)
        if same_machine:
            assert write.contents(Path(store)) == made["grown"][store]


class TestContinuing:
    @pytest.mark.parametrize("store", [*FEATURES, *LATENTS, "interrupted"])
    def test_a_lost_shard_is_written_to_the_same_bytes(
        self, torch, data, made, same_machine, store
    ):
        name = "bf16" if store == "interrupted" else store
        whole, command = Path(shutil.copytree(name, "whole")), made["commands"][name]
        if store == "interrupted":  # in place of the whole store
            shutil.rmtree(name)
            Path(store).rename(name)
            store = name
        else:
            lose(store, SHARD)
        # Shard 0 of latents has a broken image, which nobody has said is to be dropped.
        assert is_intact(store, unfinished=[0, SHARD] if store in LATENTS else [SHARD])
        kept = shards(store)
        invoke(*command)
        found = shards(store)
        assert {file: found[file] for file in kept} == kept
        assert is_intact(store)
        now, then = receipts(store), receipts(whole)
        assert now.keys() == then.keys()
        assert now["shard-000000.json"] == then["shard-000000.json"]
        for name in ("num_rows", "num_entries", "broken", "warnings"):
            assert now["shard-000001.json"][name] == then["shard-000001.json"][name]
        if store in LATENTS:
            expected = write.read_latents(whole, 0, LIMIT)
            for name, latents in write.read_latents(store, 0, LIMIT).items():
                np.testing.assert_allclose(latents, expected[name], atol=2e-2)
        else:
            expected = write.hidden_by_text(whole)
            assert compare_hidden(write.hidden_by_text(store), expected) < ERRORS[store]
        if same_machine:
            assert write.contents(Path(store)) == write.contents(whole)
            assert now == then

    def test_a_command_with_nothing_to_do_writes_nothing(self, torch, data, made):
        for store in [*FEATURES, *LATENTS]:
            before = shards(store)
            invoke(*made["commands"][store])
            assert shards(store) == before
            assert is_intact(store)

    def test_another_request_is_refused(self, torch, data, made):
        result = CliRunner().invoke(cli, [*made["commands"]["bf16"], "--layers", "1,2"])
        assert result.exit_code == 1
        assert "identity.layers" in result.output


class TestRewriting:
    @pytest.mark.parametrize("store", ["bf16", "lossless", "delta"])
    def test_to_another_codec_and_back(self, torch, data, made, store):
        """Integers into integers: these are the same to the bit on every machine."""
        invoke("rewrite", store, "there", "--codec", "lossless", "--workers", 0)
        invoke("rewrite", "there", "back", "--codec", "bf16", "--workers", 0)
        assert is_intact("back")
        assert write.describe_features("back") == made["features"][store]

    def test_mixes_for_the_run(self, torch, data, made, same_machine):
        frozen = Path("mixes").rename("frozen")
        invoke(*made["commands"]["mixes"])
        assert is_intact("mixes")
        features, expected = semroute.open_features("mixes"), semroute.open_features(frozen)
        read = [
            np.array(each.mixes.coefficients) @ numbers(each.read(range(len(each))).bits)
            for each in (features, expected)
        ]
        assert relative_errors(*read).max() < ERRORS["mixes"]
        if same_machine:
            assert write.contents(Path("mixes")) == write.contents(frozen)


@pytest.fixture
def run(torch, data):
    return data / "run"


def weights(run, step):
    return {
        name: tensor.numpy()
        for name, tensor in semroute.load_run(run, step, "model").model.state_dict().items()
    }


def drawn(folder):
    image = pytest.importorskip("PIL.Image")
    files = sorted(Path(folder).glob("0*.png"))
    assert len(files) == len(write.PROMPTS)
    return [np.asarray(image.open(file)) for file in files]


def assert_same_pictures(found, expected, exact):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        apart = np.abs(one.astype(int) - other)
        assert apart.max() <= (0 if exact else 8)
        assert other.std() > 10  # or they would be nothing to compare


class TestRun:
    def test_checkpoints_are_what_they_were(self, run, made):
        assert write.describe_run(run) == made["run"]
        opened = semroute.load_run(run)
        assert opened.step == 4
        np.testing.assert_allclose(opened.weights(), made["alpha"], rtol=1e-5)
        assert not np.allclose(opened.weights(), 0.25, atol=1e-3)
        steps, levels, history = opened.history()
        assert (steps.tolist(), levels, history.shape) == ([1, 2, 3, 4], [1.0], (4, 1, 2, 4))
        metrics = opened.metrics()
        assert metrics["step"].to_pylist() == [1, 2, 3, 4]
        assert metrics["validation_loss"].null_count == 2
        assert "4 of 4" in repr(opened)

    def test_it_samples_what_it_did(self, run, data, made, same_machine):
        pytest.importorskip("diffusers")
        expected = drawn(Path("drawn").rename("before"))
        invoke(*made["commands"]["drawn"])
        assert_same_pictures(drawn("drawn"), expected, same_machine)
        for store in ("delta", "mixes"):
            options = ["--features", store, "--num", 2, "--vae", "vae", "--num-steps", 2]
            invoke("sample", "run", *options, "--out", f"from-{store}")
        assert_same_pictures(drawn("from-mixes"), drawn("from-delta"), False)

    def test_a_lost_checkpoint_is_trained_again(self, run, made, same_machine):
        start, expected = (weights(run, step) for step in (2, 4))
        lines = (run / "metrics.jsonl").read_text().splitlines()
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        invoke(*made["commands"]["run"])
        found = weights(run, 4)
        assert found.keys() == expected.keys()
        moved = sum(np.square(expected[name] - start[name]).sum() for name in found)
        apart = sum(np.square(expected[name] - found[name]).sum() for name in found)
        assert moved > 0
        assert apart < 1e-3 * moved
        now = (run / "metrics.jsonl").read_text().splitlines()
        assert now[:2] == lines[:2]
        losses = [[json.loads(line)["loss"] for line in each] for each in (now, lines)]
        np.testing.assert_allclose(*losses, rtol=1e-3)
        if same_machine:
            assert write.describe_run(run) == made["run"]

    def test_it_trains_on(self, run, made):
        kept = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
        invoke(*made["commands"]["run"], "steps=6")
        assert {path: path.read_bytes() for path in kept} == kept
        opened = semroute.load_run(run)
        assert opened.step == 6
        losses = opened.metrics()["loss"].to_pylist()
        assert len(losses) == 6
        assert losses[5] < losses[0]

    def test_others_start_from_it(self, run, made):
        command = made["commands"]["run"]
        invoke(*command, "start=run", "output=second", "steps=1", "model.conditioning=none")
        invoke(*command, "features=mixes", "output=third", "steps=1", "routing.strategy=mixes")
        for name in ("second", "third"):
            assert semroute.load_run(name).step == 1
        assert json.loads(invoke("compare", "run", "second", "--json"))

    def test_another_run_is_refused(self, run, made):
        result = CliRunner().invoke(cli, [*made["commands"]["run"], "model.depth=3"])
        assert result.exit_code == 1
        assert "model.depth" in result.output


class TestExports:
    def test_a_pipeline_is_loaded_and_draws(self, run, data, made, same_machine):
        pytest.importorskip("diffusers")
        invoke("export", "run", "anew")
        how = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0}
        pictures = []
        for folder in ("pipeline", "anew"):
            pipeline = semroute.SemanticRoutingPipeline.from_pretrained(
                folder, llm="llm", vae="vae"
            )
            pipeline.set_progress_bar_config(disable=True)
            found = write.digest_tensors(pipeline.transformer.dit.state_dict())
            assert found == made["run"]["4"]["ema"]
            pictures.append([np.asarray(each) for each in pipeline([*write.PROMPTS], **how).images])
        assert_same_pictures(pictures[0], pictures[1], True)
        assert_same_pictures(pictures[0], drawn("drawn"), same_machine)

    def test_a_router_is_loaded_and_mixes(self, run, torch):
        invoke("export", "run", "anew", "--router")
        opened = semroute.load_run(run)
        states = torch.from_numpy(write.some_noise((5, 4, 32)))
        expected = opened.model.router(states, None)
        for folder in ("router", "anew"):
            assert torch.equal(semroute.load_router(folder)(states, None), expected)


class TestStudy:
    def test_judgements_are_reported(self, torch, data):
        """Of the runs nothing is left but what was judged of them."""
        before = (data / "study" / "report.md").read_text()
        results = pq.read_table("study/results.parquet")
        (data / "study" / "report.md").unlink()
        invoke("study", "study.yaml", "--report-only")
        assert pq.read_table("study/results.parquet").equals(results)
        assert _figures((data / "study" / "report.md").read_text()) == _figures(before)
        assert len(_figures(before)) > 100


def _figures(report):
    """All numbers in the tables of a report."""
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    return [number for row in rows for number in re.findall(r"[+-]?\d+\.\d+", row)]
