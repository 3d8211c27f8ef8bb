import hashlib
import json
import shutil

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from semroute.cli import cli
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.open import open_features, open_store
from semroute.pipeline.store.verify import repair, verify
from semroute.schemas import InputError


@pytest.fixture(params=["bf16", "lossless", "delta", "linear"])
def store(request, random_store, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(random_store(request.param), tmp_path / "store")


@pytest.fixture
def delta(random_store, tmp_path):
    return shutil.copytree(random_store("delta"), tmp_path / "store")


def flip(file, place, mask=0x01):
    content = bytearray(file.read_bytes())
    content[place] ^= mask
    file.write_bytes(content)


def test_a_store_as_it_was_written_has_no_problem(store, latent_store):
    for path in (store, latent_store):
        found = verify(path)
        assert found.problems == []
        assert found.unfinished == []
        assert found.warnings == []
        files = [file for file in path.rglob("*") if file.is_file()]
        assert found.num_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.slow
def test_a_flipped_byte_anywhere_is_found(random_store, tmp_path):
    """In every file; in large ones at intervals, with a different set of bits each time."""
    delta = shutil.copytree(random_store("delta", 48), tmp_path / "store")
    assert open_features(delta).manifest.layout.num_shards > 1
    missed = []
    for file in sorted(delta.rglob("*")):
        if not file.is_file():
            continue
        size = file.stat().st_size
        is_shard = "/c/" in str(file) and "parameters" not in str(file)
        step = max(1, size // (6 if is_shard else 12))
        for number, place in enumerate(range(0, size, step)):
            mask = (0x01, 0x80, 0x20, 0xFF)[number % 4]
            flip(file, place, mask)
            if not verify(delta).problems:
                missed.append((str(file.relative_to(delta)), place, mask))
            flip(file, place, mask)
    assert missed == []
    assert verify(delta).problems == []


class TestBadShards:
    def test_exactly_the_bad_ones_are_named_and_written_anew(self, delta, random_store):
        whole = open_features(random_store("delta"))
        num_shards = whole.manifest.layout.num_shards
        assert num_shards > 3
        flip(delta / "hidden.zarr/code/c/1/0/0", 1000)
        (delta / "hidden.zarr/escape/c/3/0/0").unlink()
        found = verify(delta)
        assert found.bad_shards == [1, 3]
        assert found.beyond_repair == []
        assert "chunk" in str(found)
        assert "Shards to be rewritten: 1, 3" in str(found)
        assert repair(found) == [1, 3]
        damaged = open_store(delta)
        assert isinstance(damaged, FeatureStore)
        assert not damaged.is_complete
        assert damaged.remaining() == [1, 3]
        again = verify(delta)
        assert again.problems == []
        assert again.unfinished == [1, 3]

    def test_extract_writes_just_those(self, samples_file, tiny_llm, tmp_path):
        pytest.importorskip("torch")
        from semroute.pipeline.extraction.features import extract

        arguments = {
            "source": str(samples_file),
            "features": tmp_path / "features",
            "model": str(tiny_llm),
            "codec": "delta",
            "shard_bytes": 100_000,
            "workers": 0,
            "report": [].append,
        }
        store = extract(**arguments)
        shards = {f: f.read_bytes() for f in sorted((store.path).rglob("c/*/0/0"))}
        times = {f: f.stat().st_mtime_ns for f in shards}
        victim = next(f for f in shards if "/code/c/2/" in str(f))
        flip(victim, 77)
        with pytest.raises(InputError):
            open_features(store.path).read(np.arange(len(store)))
        repair(verify(store.path))
        extract(**arguments)
        assert {f: f.read_bytes() for f in shards} == shards
        anew = {f for f in shards if f.stat().st_mtime_ns != times[f]}
        assert anew == {f for f in shards if f.parts[-3] == "2"}
        assert verify(store.path).problems == []

    def test_a_missing_receipt_of_a_complete_store(self, delta):
        (delta / "receipts" / "shard-000002.json").unlink()
        found = verify(delta)
        assert found.bad_shards == [2]
        assert "is missing" in str(found)

    def test_an_edited_receipt(self, delta):
        file = delta / "receipts" / "shard-000001.json"
        document = json.loads(file.read_text())
        document["codec_error"]["mean"] = 0.0
        file.write_text(json.dumps(document, indent=1) + "\n")
        assert verify(delta).bad_shards == [1]


class TestOtherDamage:
    def test_nothing_is_changed_where_a_new_shard_would_not_help(self, delta):
        flip(delta / "captions.parquet", 50)
        flip(delta / "hidden.zarr/code/c/1/0/0", 1000)
        found = verify(delta)
        assert 1 in found.bad_shards
        with pytest.raises(InputError, match=r"(?s)captions\.parquet.*Nothing was changed"):
            repair(found)
        assert open_store(delta).is_complete

    def test_parameters_of_another_fit(self, delta):
        group = zarr.open_group(delta / "hidden.zarr" / "parameters", mode="r+")
        group["slope"][0] = group["slope"][1]
        found = verify(delta)
        assert found.beyond_repair
        assert "parameters" in str(found)

    def test_files_of_others_are_mentioned(self, delta):
        (delta / "notes.txt").write_text("mine")
        found = verify(delta)
        assert found.problems == []
        assert found.warnings == ["notes.txt does not belong to the store"]

    def test_keys_that_an_early_version_did_not_write_are_not_missing(self, delta):
        manifest = json.loads((delta / "manifest.json").read_text())
        assert manifest["identity"].pop("mixes") is None
        begun = manifest | {"status": "extracting"}
        checksums = json.loads((delta / "checksums.json").read_text())
        text = json.dumps(begun, indent=1, ensure_ascii=False) + "\n"
        checksums["manifest"] = hashlib.sha256(text.encode()).hexdigest()
        for name, document in (("manifest", manifest), ("checksums", checksums)):
            text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
            (delta / f"{name}.json").write_text(text)
        assert verify(delta).problems == []

    def test_a_store_of_an_early_version_says_what_it_cannot_tell(self, delta):
        (delta / "checksums.json").unlink()
        found = verify(delta)
        assert [problem.where for problem in found.problems] == ["checksums.json"]
        with pytest.raises(InputError, match=r"has lost checksums\.json"):
            open_features(delta)
        for file in (delta / "receipts").iterdir():  # which early versions did not seal
            receipt = json.loads(file.read_text())
            file.write_text(json.dumps(receipt | {"sha256": ""}, indent=1) + "\n")
        found = verify(delta)
        assert found.problems == []
        assert "early version" in found.warnings[0]
        assert len(open_features(delta)) > 0

    def test_no_store(self, tmp_path):
        with pytest.raises(StoreError, match=r"has no manifest\.json"):
            verify(tmp_path)


def test_the_command_ends_with_1_where_something_is_wrong(delta):
    run = CliRunner().invoke
    done = run(cli, ["verify", str(delta)])
    assert done.exit_code == 0, done.output
    assert "as it was written" in done.output
    flip(delta / "hidden.zarr/code/c/1/0/0", 1000)
    done = run(cli, ["verify", str(delta), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["bad_shards"] == [1]
    done = run(cli, ["verify", str(delta), "--repair"])
    assert done.exit_code == 1
    assert "1 shards are marked as not written" in done.output
    done = run(cli, ["verify", str(delta)])
    assert done.exit_code == 0
    assert "not written yet: 1 shards" in done.output
