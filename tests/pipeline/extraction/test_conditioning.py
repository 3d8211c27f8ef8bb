import hashlib
import json
import shutil

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tiny_pipelines import FAMILIES  # noqa: E402
from tiny_text_halves import VIDEO_FAMILIES, make_text_half  # noqa: E402

from semroute.cli import cli  # noqa: E402
from semroute.pipeline.extraction.conditioning import encode_captions  # noqa: E402
from semroute.pipeline.extraction.driver import ExtractionError  # noqa: E402
from semroute.pipeline.extraction.features import extract  # noqa: E402
from semroute.pipeline.inspection.against import compare_with_pipeline  # noqa: E402
from semroute.pipeline.inspection.describe import inspect  # noqa: E402
from semroute.pipeline.inspection.hub import make_card  # noqa: E402
from semroute.pipeline.inspection.report import write_report  # noqa: E402
from semroute.pipeline.inspection.status import status  # noqa: E402
from semroute.pipeline.models.text_pipelines import (  # noqa: E402
    TextPipeline,
    open_text_pipeline,
)
from semroute.pipeline.store.conditioning import ConditioningStore  # noqa: E402
from semroute.pipeline.store.documents import StoreError, passed_against  # noqa: E402
from semroute.pipeline.store.open import (  # noqa: E402
    open_conditioning,
    open_features,
    open_store,
)
from semroute.pipeline.store.verify import repair, verify  # noqa: E402
from semroute.schemas import MASK  # noqa: E402

pytestmark = pytest.mark.usefixtures("short_padding")
EVERY_FAMILY = (*FAMILIES, *VIDEO_FAMILIES)
CAPTIONS = [
    "a red cup",
    "two Green dogs on a long table",
    "a red cup",
    "a box at night",
    "a tree in the snow",
    "a clock on a table",
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    return write_captions(path, CAPTIONS)


def write_captions(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make(captions, path, pipeline, **options):
    options = {"workers": 0, "threads": 1, "report": lambda _: None} | options
    return encode_captions(str(captions), path, pipeline=str(pipeline), **options)


@pytest.fixture(scope="module")
def krea2(captions, tiny_pipeline, tmp_path_factory):
    """A store of several shards, one row per token; read only."""
    path = tmp_path_factory.mktemp("conditioning") / "krea2"
    return make(captions, path, tiny_pipeline("krea2"), shard_bytes=4_000)


@pytest.fixture(scope="module")
def sd3(captions, tiny_pipeline, tmp_path_factory):
    """A store of several shards, one row per caption; read only."""
    path = tmp_path_factory.mktemp("conditioning") / "sd3"
    return make(captions, path, tiny_pipeline("sd3"), shard_bytes=50_000)


def files_of(path):
    """File -> sha256; those that tell time or place are left out."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and not str(file.relative_to(path)).startswith(("receipts", "manifest"))
    }


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_what_a_pipeline_gives_is_stored_exactly(family, captions, tiny_pipeline, tmp_path):
    if family in VIDEO_FAMILIES:
        folder = make_text_half(family, tmp_path / "pipeline")
    else:
        folder = tiny_pipeline(family)
    store = make(captions, tmp_path / "store", folder, limit=1)
    text = open_text_pipeline(str(folder))
    identity = store.manifest.identity
    assert identity.layers == text.base_layers
    assert identity.ragged != text.recipe.reads_padding
    texts = store.captions["text"].to_pylist()
    assert texts == ["", CAPTIONS[0]]
    ids = [1, 0, 1]
    read = store.tensors(ids)
    assert (MASK in read) == text.recipe.reads_padding
    stops = np.cumsum(store.num_rows(ids))
    encoded = [text.encode_one(caption) for caption in texts]
    for number, caption in enumerate(ids):
        expected = encoded[caption]
        own = store.captions["token_ids"][caption].as_py()
        assert own == text.tokens(texts[caption]).tolist()
        for name, values in read.items():
            first = stops[number - 1] if number else 0
            found = values[first : stops[number]] if identity.ragged else values[number]
            assert torch.equal(found, expected[name].to(found.dtype)), name
    assert verify(store.path).problems == []


def test_captions_have_the_numbers_that_they_have_in_features(captions, krea2, tiny_llm, tmp_path):
    features = extract(
        str(captions),
        tmp_path / "features",
        model=str(tiny_llm),
        codec="bf16",
        workers=0,
        report=lambda _: None,
    )
    ours, theirs = krea2.manifest.identity, features.manifest.identity
    assert (ours.captions, ours.samples) == (theirs.captions, theirs.samples)
    assert krea2.captions["text"].equals(features.captions["text"])
    assert krea2.samples.equals(features.samples)
    assert krea2.captions["text"][0].as_py() == ""
    krea2.check_source(captions, CAPTIONS)


def test_bfloat16_is_kept_as_its_bits(captions, tiny_pipeline, tmp_path):
    folder = tiny_pipeline("hidream")
    store = make(captions, tmp_path / "store", folder, dtype="bfloat16", limit=1)
    text = open_text_pipeline(str(folder), dtype="bfloat16")
    expected = text.encode_one("a red cup")
    bits = store.read([1])
    for name, values in store.tensors([1]).items():
        assert torch.equal(values[0], expected[name].to(values.dtype)), name
    assert bits["prompt_embeds_llama3"].dtype == np.uint16
    names = ["pooled_prompt_embeds", "mask"]
    assert [*store.read([0, 1], names)] == names
    array = zarr.open_array(store.path / "conditioning.zarr/prompt_embeds_llama3", mode="r")
    assert np.array_equal(array[1], bits["prompt_embeds_llama3"][0])
    assert array.metadata.dimension_names == ("caption", "token", "layer", "channel")


class TestReading:
    def test_into_buffers(self, krea2):
        expected = krea2.read([3, 1])["prompt_embeds"]
        buffer = np.full((len(expected) + 2, *expected.shape[1:]), 7, expected.dtype)
        found = krea2.read([3, 1], out={"prompt_embeds": buffer})["prompt_embeds"]
        assert np.shares_memory(found, buffer)
        assert np.array_equal(found, expected)
        assert (buffer[len(expected) :] == 7).all()
        with pytest.raises(ValueError, match="expected float32"):
            krea2.read([3, 1], out={"prompt_embeds": buffer[:, :1]})

    def test_of_what_is_not_there(self, krea2):
        with pytest.raises(StoreError, match="caption ids 9 to 9 asked for; the store has 0 to 5"):
            krea2.read([9])
        with pytest.raises(StoreError, match="has no tensor 'mask'; it has prompt_embeds"):
            krea2.read([0], ["mask"])

    def test_by_url(self, sd3):
        store = open_conditioning(f"local://{sd3.path}")
        assert np.array_equal(
            store.read([1])["pooled_prompt_embeds"], sd3.read([1])["pooled_prompt_embeds"]
        )


class TestResuming:
    @pytest.mark.parametrize("family", ["krea2", "sd3"])
    def test_a_stopped_store_ends_in_the_same_bytes(
        self, family, request, captions, tiny_pipeline, tmp_path
    ):
        whole = request.getfixturevalue(family)
        path = shutil.copytree(whole.path, tmp_path / "store")
        stopped = ConditioningStore.open(path)
        assert stopped.manifest.layout.num_shards > 2
        stopped.reopen([1, 2])
        shutil.rmtree(path / f"conditioning.zarr/{next(iter(stopped.arrays))}/c/2")
        written = stopped.manifest.layout.num_shards - 2
        assert f"{written}/{written + 2} shards" in str(status(path))
        lines = []
        size = {"krea2": 4_000, "sd3": 50_000}[family]
        again = make(captions, path, tiny_pipeline(family), shard_bytes=size, report=lines.append)
        assert again.is_complete
        assert any("to do: 2" in line for line in lines)
        assert files_of(path) == files_of(whole.path)
        written = [receipt.files for _, receipt in sorted(again.receipts().items())]
        assert written == [receipt.files for _, receipt in sorted(whole.receipts().items())]

    def test_new_rows_go_into_new_shards(self, captions, krea2, tiny_pipeline, tmp_path):
        path = shutil.copytree(krea2.path, tmp_path / "store")
        longer = write_captions(tmp_path / "longer.jsonl", [*CAPTIONS, "a new tree", "a red cup"])
        folder = tiny_pipeline("krea2")
        grown = make(longer, path, folder, shard_bytes=4_000)
        before = krea2.manifest.layout.num_shards
        assert grown.manifest.layout.num_shards == before + 1
        assert grown.captions["text"].to_pylist()[len(krea2) :] == ["a new tree"]
        assert grown.manifest.before_growth().identity == krea2.manifest.identity
        ids = range(len(krea2))
        for name, values in krea2.read(ids).items():
            assert np.array_equal(grown.read(ids)[name], values)
        new = grown.tensors([len(krea2)])["prompt_embeds"]
        expected = open_text_pipeline(str(folder)).encode_one("a new tree")["prompt_embeds"]
        assert torch.equal(new, expected)
        assert verify(path).problems == []

    def test_another_file_is_refused(self, krea2, tiny_pipeline, tmp_path):
        path = shutil.copytree(krea2.path, tmp_path / "store")
        other = write_captions(tmp_path / "other.jsonl", ["a blue cup", *CAPTIONS[1:]])
        with pytest.raises(StoreError, match="row 0, counted from 0, is 'a blue cup'"):
            make(other, path, tiny_pipeline("krea2"), shard_bytes=4_000)

    @pytest.mark.parametrize(
        ("family", "options", "key"),
        [
            ("qwen-image", {}, "identity.pipeline: 'QwenImagePipeline' instead of 'Krea2Pipeline'"),
            ("krea2", {"dtype": "bfloat16"}, "identity.dtype: 'bfloat16' instead of 'float32'"),
            ("krea2", {"seed": 1}, "identity.captions.seed: 1 instead of 0"),
        ],
    )
    def test_other_settings_are_refused(
        self, captions, krea2, tiny_pipeline, tmp_path, family, options, key
    ):
        path = shutil.copytree(krea2.path, tmp_path / "store")
        with pytest.raises(StoreError, match="was made differently") as raised:
            make(captions, path, tiny_pipeline(family), shard_bytes=4_000, **options)
        assert key in str(raised.value)


class TestFaults:
    def test_values_that_are_not_finite_are_put_into_quarantine(
        self, captions, tiny_pipeline, tmp_path, monkeypatch
    ):
        encode = TextPipeline.encode_one

        def broken(self, text):
            return {
                name: values / ("box" not in text) for name, values in encode(self, text).items()
            }

        monkeypatch.setattr(TextPipeline, "encode_one", broken)
        path = tmp_path / "store"
        with pytest.raises(ExtractionError, match="'a box at night' is not finite"):
            make(captions, path, tiny_pipeline("pixart"), shard_bytes=500)
        store = ConditioningStore.open(path, complete=False)
        (quarantine,) = store.quarantined().values()
        assert "a box at night" in store.captions["text"].take(quarantine.entries).to_pylist()
        monkeypatch.undo()
        assert make(captions, path, tiny_pipeline("pixart"), shard_bytes=500).is_complete

    def test_a_flipped_byte_is_found_and_repaired(self, captions, sd3, tiny_pipeline, tmp_path):
        path = shutil.copytree(sd3.path, tmp_path / "store")
        file = path / "conditioning.zarr/prompt_embeds/c/1/0/0"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        found = verify(path)
        assert found.bad_shards == repair(found) == [1]
        make(captions, path, tiny_pipeline("sd3"), shard_bytes=50_000)
        assert files_of(path) == files_of(sd3.path)

    def test_tables_are_compared_with_the_manifest(self, krea2, sd3, tmp_path):
        for store, other in ((krea2, sd3), (sd3, krea2)):
            path = shutil.copytree(store.path, tmp_path / store.path.name)
            shutil.copy(other.path / "captions.parquet", path)
            (path / "checksums.json").unlink()
            found = [str(problem) for problem in verify(path).problems]
            assert any("captions.parquet cannot be used: has " in problem for problem in found)

    def test_another_kind_of_store_is_refused(self, krea2, latent_store):
        with pytest.raises(StoreError, match="is no conditioning store"):
            open_conditioning(latent_store)
        with pytest.raises(StoreError, match="is no feature store"):
            open_features(krea2.path)


class TestAgainst:
    def test_its_own_pipeline_passes(self, krea2, tiny_pipeline, tmp_path):
        path = shutil.copytree(krea2.path, tmp_path / "store")
        found = compare_with_pipeline(path, str(tiny_pipeline("krea2")))
        assert found.problems == []
        assert found.max_difference == 0
        source = open_text_pipeline(str(tiny_pipeline("krea2"))).source
        assert passed_against(path, "Krea2Pipeline", source.files)

    def test_another_pipeline_is_named(self, krea2, tiny_pipeline):
        found = compare_with_pipeline(krea2.path, str(tiny_pipeline("qwen-image")))
        assert found.problems[0] == "the store is of Krea2Pipeline"

    def test_other_files_are_named(self, krea2, tiny_pipeline, tmp_path):
        folder = shutil.copytree(tiny_pipeline("krea2"), tmp_path / "pipeline")
        config = folder / "text_encoder/config.json"
        config.write_text(config.read_text() + " ")
        found = compare_with_pipeline(krea2.path, str(folder))
        assert "the store is of other files (files.text_encoder/config.json" in found.problems[0]

    def test_other_values_are_named(self, sd3, tiny_pipeline, monkeypatch):
        encode = TextPipeline.encode_one

        def louder(self, text):
            values = encode(self, text)
            return values | {"pooled_prompt_embeds": 1.1 * values["pooled_prompt_embeds"]}

        monkeypatch.setattr(TextPipeline, "encode_one", louder)
        found = compare_with_pipeline(sd3.path, str(tiny_pipeline("sd3")))
        assert "pooled_prompt_embeds has other values" in found.problems[0]


class TestLooking:
    def test_summary_and_status(self, krea2, sd3):
        assert isinstance(open_store(krea2.path), ConditioningStore)
        shown = str(krea2)
        assert "Krea2Pipeline" in shown
        assert "float32 3 x 32" in shown
        assert "each caption's own rows" in shown
        assert "all rows, padding included, of at most 256" in str(sd3)
        assert status(krea2.path).details["captions_total"] == 6
        report = inspect(krea2.path)
        assert report.details["format"] == "semroute.conditioning"
        assert report.details["manifest"]["identity"]["rows"] == "prompt_embeds"

    def test_report_and_card(self, sd3, tmp_path):
        page = write_report(sd3.path, tmp_path / "page.html").read_text()
        assert "StableDiffusion3Pipeline" in page
        card = make_card(sd3, "me/sd3")
        assert "semroute.open_conditioning" in card
        assert "What a pipeline of diffusers gives its transformer" in card


class TestCommand:
    def test_makes_a_store_and_resumes(self, captions, tiny_pipeline, tmp_path):
        arguments = ["conditioning", str(captions), str(tmp_path / "store")]
        arguments += [
            "--pipeline",
            str(tiny_pipeline("pixart")),
            "--workers",
            "0",
            "--threads",
            "1",
        ]
        for last in ("PixArtSigmaPipeline", "nothing was left to do"):
            result = CliRunner().invoke(cli, arguments)
            assert result.exit_code == 0, result.output
            assert last in result.output
        assert len(open_conditioning(tmp_path / "store")) == 6

    def test_names_what_it_does_not_know(self, captions, tmp_path):
        arguments = ["conditioning", str(captions), str(tmp_path / "store"), "--pipeline"]
        result = CliRunner().invoke(cli, [*arguments, "nowhere"])
        assert result.exit_code == 1
        assert "--pipeline nowhere: no such folder, and not a hub id" in result.output
        assert not (tmp_path / "store/manifest.json").exists()


@pytest.mark.slow
def test_workers_write_the_same_bytes(captions, krea2, tiny_pipeline, tmp_path):
    store = make(captions, tmp_path / "store", tiny_pipeline("krea2"), shard_bytes=4_000, workers=2)
    assert store.is_complete
    ids = range(len(krea2))
    for name, values in krea2.read(ids).items():
        assert np.allclose(store.read(ids)[name], values, atol=1e-5)
