import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from semroute.pipeline.rewriting import rewrite
from semroute.pipeline.store import StoreError, open_features
from semroute.pipeline.verification import verify
from semroute.schemas import InputError

torch = pytest.importorskip("torch")


@pytest.fixture
def arguments(feature_store, tmp_path):
    return {
        "features": feature_store,
        "out": tmp_path / "out",
        "shard_bytes": 100_000,
        "workers": 0,
        "report": [].append,
    }


def contents(store):
    files = [*store.glob("*.parquet"), *store.glob("hidden.zarr/**/*")]
    return {str(f.relative_to(store)): f.read_bytes() for f in files if f.is_file()}


@pytest.mark.parametrize("codec", ["bf16", "lossless"])
def test_exact_codecs_change_no_bit(arguments, feature_store, codec):
    source, found = open_features(feature_store), rewrite(**arguments | {"codec": codec})
    np.testing.assert_array_equal(found.read(range(193)).bits, source.read(range(193)).bits)
    assert found.manifest.derived is not None
    assert found.manifest.derived.codec == source.manifest.codec
    assert found.manifest.derived.codec_error > 1e-4
    assert all(r.codec_error["mean"] == 0 for r in found.receipts().values())
    assert verify(found.path).problems == []


@pytest.mark.parametrize("codec", ["delta", "linear"])
def test_what_is_lost_is_measured_and_lossy_stores_come_back(arguments, feature_store, codec):
    found = rewrite(**arguments | {"codec": codec, "quality": 5, "layers": "2,4"})
    assert found.layers == [2, 4]
    exact = open_features(feature_store).read(range(193), [2, 4]).tensor().float()
    norm = torch.nn.functional.layer_norm
    a, b = (norm(x, (32,)) for x in (exact, found.read(range(193)).tensor().float()))
    error = ((b - a).norm(dim=-1) / a.norm(dim=-1)).mean().item()
    promised = np.mean([r.codec_error["mean"] for r in found.receipts().values()])
    assert 0.8 < promised / error < 1.25
    back = rewrite(**arguments | {
        "features": found.path, "out": found.path.with_name("back"), "codec": "bf16"
    })  # fmt: skip
    np.testing.assert_array_equal(back.read(range(193)).bits, found.read(range(193)).bits)


def test_a_subset_of_captions_with_samples_of_its_own(arguments, feature_store, texts, tmp_path):
    chosen = [texts[5], texts[3], texts[5]]
    file = tmp_path / "some.parquet"
    pa.parquet.write_table(pa.table({"text": chosen}), file)
    found, source = rewrite(**arguments | {"captions": str(file)}), open_features(feature_store)
    assert len(found) == 3
    assert found.captions["text"].to_pylist()[0] == ""
    assert found.samples.num_rows == 3
    for text, (caption,) in zip(chosen, found.samples["caption_ids"].to_pylist(), strict=True):
        old = source.captions["text"].to_pylist().index(text)
        assert found[caption].text == text
        np.testing.assert_array_equal(found[caption].hidden, source[old].hidden)
    assert verify(found.path).problems == []


class TestRefused:
    def test_captions_that_are_not_there(self, arguments, tmp_path):
        file = tmp_path / "other.txt"
        file.write_text("a red cup\na purple elephant\n")
        with pytest.raises(InputError, match=r"1 captions are not in .*a purple elephant"):
            rewrite(**arguments | {"captions": str(file)})
        assert not arguments["out"].exists()

    def test_layers_that_are_not_there(self, arguments):
        few = rewrite(**arguments | {"layers": "1,3"})
        with pytest.raises(InputError, match=r"does not hold \[2\]; it has \[1, 3\]"):
            rewrite(**arguments | {"features": few.path, "out": few.path / "x", "layers": "2,3"})

    def test_itself(self, arguments, feature_store):
        with pytest.raises(InputError, match="is the store itself"):
            rewrite(**arguments | {"out": feature_store})

    def test_another_request_for_the_same_folder(self, arguments):
        rewrite(**arguments | {"codec": "delta"})
        with pytest.raises(StoreError, match=r"codec\.quality"):
            rewrite(**arguments | {"codec": "delta", "quality": 3})


def test_a_damaged_source_is_quarantined_and_never_copied(arguments, feature_store, tmp_path):
    damaged = shutil.copytree(feature_store, tmp_path / "damaged")
    file = damaged / "hidden.zarr/hidden/c/0/0/0"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="chunk 0 at byte"):
        rewrite(**arguments | {"features": damaged})
    out = open_features(arguments["out"], complete=False)
    assert out.remaining()
    assert set(out.quarantined()) == set(out.remaining())


def test_a_killed_rewriting_is_continued_to_the_same_bytes(arguments, feature_store, tmp_path):
    whole = rewrite(**arguments | {"codec": "delta", "shard_bytes": 25_000})
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "semroute.cli", "rewrite", str(feature_store), str(killed)]
    command += ["--codec", "delta", "--shard-size", "25000", "--workers", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(killed.glob("receipts/shard-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert open_features(killed, complete=False).remaining()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(killed) == contents(whole.path)
