"""Stores made with presets of pipelines, through the public door."""

import json

import numpy as np
import pyarrow.parquet
import pytest

pytest.importorskip("torch")

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.extraction.rewrite import rewrite
from semroute.pipeline.store.verify import verify
from semroute.pipeline.text.presets import PRESETS
from semroute.schemas import FeatureManifest, InputError, digest, render

TEXTS = ["A Red CUP ", "a red cup", "two  birds &amp; a tree", "x" * 300]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("captions") / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    return path


@pytest.fixture
def make(source, tiny_llm, tmp_path):
    def make(name="store", lines=None, **options):
        lines = [] if lines is None else lines
        options = {"model": str(tiny_llm), "codec": "bf16", "workers": 0, "threads": 1} | options
        return extract(str(source), tmp_path / name, report=lines.append, **options)

    return make


@pytest.mark.parametrize("template", ["sana", "wan", "krea2", "cosmos", "bos"])
def test_new_texts_are_encoded_as_the_captions_of_the_store(make, tiny_llm, template):
    """Cleaned, put into the template, cut, and with the same rows, from the manifest alone."""
    store = make(template=template, max_length=1900 if template == "sana" else 260)
    assert store.captions["text"].to_pylist()[0] == ""
    assert sorted(store.captions["text"].to_pylist()[1:]) == sorted(TEXTS)
    prompts = PromptEncoder(store.manifest.identity, str(tiny_llm))(TEXTS)
    texts = store.captions["text"].to_pylist()
    ids = [0, *(texts.index(text) for text in TEXTS)]
    found, expected = prompts.read(range(5)), store.read(ids)
    assert found.offsets.tolist() == expected.offsets.tolist()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2**-7, atol=1e-5)
    processing = store.manifest.identity.template.processing
    assert (processing is None) == (template == "bos")
    if processing is not None:
        assert processing.preset == template
        assert processing.cleaning == PRESETS[template].cleaning
    assert not any(receipt.warnings for receipt in store.receipts().values())


def test_the_same_text_after_cleaning_has_the_same_rows(make):
    store = make(template="sana")
    texts = store.captions["text"].to_pylist()
    one, other = (store[texts.index(text)] for text in TEXTS[:2])
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.hidden, other.hidden, atol=1e-4)
    assert one.text != other.text
    first, stop = store.manifest.identity.template.processing.dropped_rows
    assert f"preset sana, rows {first} to {stop - 1} dropped" in repr(store)


def test_a_store_that_knew_the_preset_as_a_plain_template_resumes(make, tmp_path):
    """Earlier versions dropped the prefix that the pipeline reads, and cut at 512 tokens."""
    (tmp_path / "lumina2.txt").write_text(PRESETS["lumina2"].text)
    before = make(template=str(tmp_path / "lumina2.txt"))
    lines: list[str] = []
    after = make(template="lumina2", lines=lines)
    assert lines[-1].endswith("nothing was left to do")
    assert after.manifest.identity == before.manifest.identity
    assert after.manifest.identity.template.keep_prefix is False
    new = make("new", template="lumina2")
    assert new.manifest.identity.template.keep_prefix is True
    assert new.manifest.identity.max_length == 256
    with pytest.raises(InputError, match=r"identity\.template\.processing"):
        make("new", template=str(tmp_path / "lumina2.txt"))


def test_manifests_without_the_new_keys_keep_their_digest(make):
    document = json.loads(digest_source := make().path.joinpath("manifest.json").read_text())
    assert document["identity"]["template"].pop("processing", "absent") is None
    old = FeatureManifest.model_validate(document)
    assert old == FeatureManifest.model_validate_json(digest_source)
    assert json.loads(old.model_dump_json(exclude_unset=True)) == document
    assert digest(old, early=True) != digest(old)


class TestFinalNorm:
    def test_the_last_layer_before_the_norm_has_a_number_of_its_own(self, make):
        normed, raw, both = (make(name, final_norm=name) for name in ("normed", "raw", "both"))
        stores = (normed, raw, both)
        assert [store.layers for store in stores] == [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4, 5]]
        assert [store.manifest.identity.final_norm for store in stores] == ["normed", "raw", "both"]
        for store in (normed, raw):
            np.testing.assert_array_equal(
                both.read(range(5), store.layers).bits, store.read(range(5)).bits
            )
        assert "4 after the final norm and 5 before it" in repr(both)
        assert "5 being 4 before the final norm" in repr(raw)
        assert both.to_xarray()["layer"].values.tolist() == [1, 2, 3, 4, 5]

    def test_a_store_with_both_is_rewritten_to_either(self, make, tmp_path):
        both = make(final_norm="both")
        for layers, final_norm, kept in [
            ("1-3,5", "raw", [1, 2, 3, 5]),
            ("every:2", "both", [2, 4, 5]),
            ("1,4", "normed", [1, 4]),
            ("1,2", "absent", [1, 2]),
        ]:
            found = rewrite(both.path, tmp_path / layers, layers=layers, workers=0, report=str)
            assert found.manifest.identity.final_norm == final_norm
            assert found.layers == kept
            np.testing.assert_array_equal(found.read(range(5)).bits, both.read(range(5), kept).bits)

    def test_new_texts_are_encoded_with_both(self, make, tiny_llm):
        store = make(final_norm="both", codec="delta")
        prompts = PromptEncoder(store.manifest.identity, str(tiny_llm))(["a cup"])
        normed, raw = prompts.read([1], [4, 5]).numpy().swapaxes(0, 1)
        assert np.abs(normed - raw).max() > 0.01
        deviation = np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(normed, raw / deviation, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize(
        ("layers", "final_norm", "message"),
        [
            ("1,4", "raw", "names that of the last block after the final norm; layer 4 is taken"),
            ("1,2", "both", "names no output of the last block; layer 4 is taken after"),
        ],
    )
    def test_options_that_contradict_one_another_are_refused(
        self, make, layers, final_norm, message
    ):
        with pytest.raises(InputError, match=message):
            make(layers=layers, final_norm=final_norm)

    def test_presets_know_how_their_pipeline_reads_the_last_layer(self, make):
        assert make("raw", template="qwen-image-2.1").layers == [1, 2, 3, 5]
        assert make("all", template="ltx2").layers == [0, 1, 2, 3, 4]
        assert make("chosen", template="qwen-image-2.1", layers="2,4").layers == [2, 4]


def test_layers_that_the_pipeline_reads_and_the_llm_lacks_are_named(make):
    lines: list[str] = []
    make(template="flux2", lines=lines)
    assert any(
        "preset flux2 reads layers 10, 20, 30 of its LLM; this one has 4" in x for x in lines
    )


def test_a_manifest_of_an_early_version_stays_as_it_was_when_its_store_is_completed(make):
    """Whose keys are fewer, and whose digest is in checksums.json."""
    store = make()
    file, checksums = store.path / "manifest.json", store.path / "checksums.json"
    document = json.loads(file.read_text())
    del document["identity"]["template"]["processing"], document["codec"]["exact_layers"]
    old = FeatureManifest.model_validate(document)
    before = render(old, early=True)
    file.write_text(before)
    listed = json.loads(checksums.read_text())
    listed["manifest"] = digest(old.unfinished(), early=True)
    checksums.write_text(json.dumps(listed, indent=1) + "\n")
    type(store).open(store.path).reopen([0])
    assert not verify(store.path).problems
    make()
    assert file.read_text() == before
    assert not verify(store.path).problems
