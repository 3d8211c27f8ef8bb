"""Layers that are stored exactly beside codes with loss, through the public door."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

pytest.importorskip("torch")

import torch

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.store.open import open_features
from semroute.pipeline.store.verify import verify
from semroute.schemas import Codec, InputError

TEXTS = [f"a {colour} {thing}" for colour in ("red", "green") for thing in ("cup", "tree", "car")]
EXACT = [2, 4]


@pytest.fixture(scope="module")
def make(tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")

    def make(name, texts=TEXTS, lines=None, **options):
        source = folder / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
        options = {"model": str(tiny_llm), "workers": 0, "threads": 1} | options
        report = str if lines is None else lines.append
        return extract(str(source), folder / name, shard_bytes=6_000, report=report, **options)

    return make


@pytest.fixture(scope="module")
def bf16(make):
    return make("bf16", codec="bf16")


@pytest.fixture(scope="module", params=["predictive", "linear"])
def stores(make, request):
    """With exact layers, and without."""
    codec = request.param
    plain = make(codec, codec=codec)
    return make(f"{codec}-exact", codec=codec, exact_layers="2,4"), plain


def everything(store, layers=None):
    return store.read(range(len(store)), layers).bits


class TestReading:
    def test_every_reader_gives_exact_rows(self, stores, bf16):
        store, plain = stores
        assert store.manifest.codec.exact_layers == (2, 4)
        ids = [3, 0, 5]
        for layers in ([4], [2, 4], [4, 1, 2], [3, 1], None):
            wanted = layers or [1, 2, 3, 4]
            expected = plain.read(ids, layers).bits.copy()
            for slot, layer in enumerate(wanted):
                if layer in EXACT:
                    expected[:, slot] = bf16.read(ids, [layer]).bits[:, 0]
            np.testing.assert_array_equal(store.read(ids, layers).bits, expected)
            padded = store.read_padded(ids, layers)
            counts = store.num_rows(ids)
            rows = np.concatenate([padded[i, :count] for i, count in enumerate(counts)])
            np.testing.assert_array_equal(rows, expected)
            found = store.read_codes(ids, layers).tensor()
            for slot, layer in enumerate(wanted):
                bits = found[:, slot].contiguous().view(torch.uint16).numpy()
                if layer in EXACT or store.manifest.codec.name == "predictive":
                    np.testing.assert_array_equal(bits, expected[:, slot])

    def test_exact_layers_alone_are_read_from_their_own_array(self, stores, tmp_path):
        store, _ = stores
        copy = shutil.copytree(store.path, tmp_path / "copy")
        for name in ("code", "escape", "scalar"):
            shutil.rmtree(copy / "hidden.zarr" / name / "c")
        found = type(store).open(copy)
        np.testing.assert_array_equal(everything(found, EXACT), everything(store, EXACT))
        assert {*found.read_codes([1], [4]).arrays} == {"exact"}
        with pytest.raises(InputError):
            everything(found, [1])


class TestStoring:
    def test_nothing_else_changes_by_a_byte(self, stores):
        store, plain = stores
        files = {f.relative_to(plain.path) for f in plain.path.glob("hidden.zarr/**/*")}
        for file in files:
            if (plain.path / file).is_file() and file.parts[1] != "zarr.json":
                assert (store.path / file).read_bytes() == (plain.path / file).read_bytes()
        added = {f.relative_to(store.path) for f in store.path.glob("hidden.zarr/**/*")} - files
        assert {file.parts[1] for file in added} == {"exact"}
        metadata = json.loads((store.path / "hidden.zarr/exact/zarr.json").read_text())
        assert metadata["attributes"]["semroute"]["layers"] == EXACT
        assert metadata["dimension_names"] == ["row", "exact_layer", "channel"]
        assert metadata["data_type"] == "uint16"
        assert metadata["shape"][1:] == [2, 32]

    def test_it_is_described_and_verified(self, stores, tmp_path):
        store, _ = stores
        assert not verify(store.path).problems
        assert "exact in layers 2, 4" in repr(store)
        report = inspect(store.path)
        assert report.details["exact_layers"] == EXACT
        error = report.details["layer_error"]
        assert max(error[2], error[4]) < 2**-8 < min(error[1], error[3])
        copy = shutil.copytree(store.path, tmp_path / "copy")
        file = copy / "hidden.zarr/exact/c/1/0/0"
        content = bytearray(file.read_bytes())
        content[10] ^= 1
        file.write_bytes(content)
        assert verify(copy).bad_shards == [1]

    def test_it_resumes_and_is_refused_as_another_store(self, make, stores):
        store, _ = stores
        name = store.manifest.codec.name
        before = (store.path / "hidden.zarr/exact/c/1/0/0").read_bytes()
        store.reopen([1])
        make(f"{name}-exact", codec=name)  # as the store has it
        assert (store.path / "hidden.zarr/exact/c/1/0/0").read_bytes() == before
        with pytest.raises(InputError, match=r"codec\.exact_layers: \[\] instead of \[2, 4\]"):
            make(f"{name}-exact", codec=name, exact_layers="none")

    def test_it_grows(self, make, tiny_llm):
        options = {"codec": "delta", "exact_layers": "2,4"}
        make("grown", TEXTS, **options)
        grown = make("grown", [*TEXTS, "a bird", "two birds"], **options)
        assert not verify(grown.path).problems
        expected = make("all", [*TEXTS, "a bird", "two birds"], codec="bf16")
        texts = expected.captions["text"].to_pylist()
        for caption in grown:
            row = expected.read([texts.index(caption.text)], EXACT).numpy()
            np.testing.assert_allclose(caption.hidden[:, [1, 3]], row, rtol=2**-7, atol=1e-6)

    def test_bytes_are_estimated_with_them(self, make, monkeypatch):
        lines: list[str] = []
        plain = make("short", codec="delta", lines=lines)
        exact = make("short-exact", codec="delta", exact_layers="1-3", lines=lines)
        assert exact.num_bytes() > 1.5 * plain.num_bytes()
        ratios = [float(line.split(": ")[1].split("x")[0]) for line in lines if "fitted" in line]
        assert ratios[1] < 0.6 * ratios[0]


class TestRewriting:
    def test_exact_layers_stay_exact_while_the_codec_has_loss(self, stores, bf16, tmp_path):
        store = open_features(stores[0].path)  # a test before this one wrote it again
        same = rewrite(store.path, tmp_path / "same", workers=0, report=str)
        assert same.manifest.codec.exact_layers == (2, 4)
        np.testing.assert_array_equal(everything(same, EXACT), everything(bf16, EXACT))
        fewer = rewrite(store.path, tmp_path / "fewer", layers="1,2", workers=0, report=str)
        assert fewer.manifest.codec.exact_layers == (2,)
        whole = rewrite(store.path, tmp_path / "whole", codec="bf16", workers=0, report=str)
        assert whole.manifest.codec == Codec(name="bf16")
        np.testing.assert_array_equal(everything(whole), everything(store))
        none = rewrite(store.path, tmp_path / "none", exact_layers="none", workers=0, report=str)
        assert "exact" not in none.arrays

    def test_of_a_source_with_loss_only_what_it_has(self, stores, bf16, tmp_path):
        store, plain = stores
        for source, held in ((store, r"\[2, 4\]"), (plain, "no layer")):
            with pytest.raises(InputError, match=rf"does not hold \[3\] exactly, but {held}"):
                rewrite(source.path, tmp_path / "out", exact_layers="3", workers=0, report=str)
        made = rewrite(
            bf16.path, tmp_path / "made", codec="delta", exact_layers="3", workers=0, report=str
        )
        np.testing.assert_array_equal(everything(made, [3]), everything(bf16, [3]))


class TestChoosing:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"template": "pixart"}, [4]),
            ({"template": "z-image"}, [3]),
            ({"template": "qwen-image-2.1"}, [5]),
            ({"template": "z-image", "layers": "1,2,4"}, []),
            ({"template": "z-image", "exact_layers": "none"}, []),
            ({"template": "z-image", "exact_layers": "1,4"}, [1, 4]),
            ({"template": "z-image", "codec": "lossless"}, []),
            ({"template": "cosmos"}, []),
            ({"template": "flux2"}, []),
            ({}, []),
        ],
    )
    def test_presets_know_what_their_pipeline_reads(self, make, options, expected, tmp_path):
        store = make(tmp_path.name, **({"codec": "delta"} | options))
        assert [*store.manifest.codec.exact_layers] == expected

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"exact_layers": "1", "codec": "lossless"}, "--codec lossless stores every layer exa"),
            ({"exact_layers": "base"}, "the template is no preset of a pipeline; give the numbers"),
            ({"exact_layers": "base", "template": "cosmos"}, "reads all layers; with --codec loss"),
            ({"exact_layers": "base", "template": "flux2"}, "reads layers 10, 20, 30; to be stored "
             "are 1, 2, 3, 4 of an LLM of 4"),
            ({"exact_layers": "1-4"}, "1-4 are all that are stored; with --codec lossless"),
            ({"exact_layers": "3", "layers": "1,4"}, "layers 3 are not to be stored; expected so"),
            ({"exact_layers": "5"}, "--exact-layers: no layer 5; the model has layers 0 to 4"),
            ({"exact_layers": "first"}, "--exact-layers 'first': expected all, every:3, or num"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_refused(self, make, options, message, tmp_path):
        with pytest.raises(InputError, match=message):
            make(tmp_path.name, **({"codec": "delta"} | options))
