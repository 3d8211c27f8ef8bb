"""Stores made with presets of pipelines, through the public door."""

import json

import numpy as np
import pyarrow.parquet
import pytest

pytest.importorskip("torch")

from semroute.pipeline.extraction.features import extract
from semroute.pipeline.extraction.prompts import PromptEncoder
from semroute.pipeline.text.presets import PRESETS
from semroute.schemas import FeatureManifest, InputError, digest

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


def test_layers_that_the_pipeline_reads_and_the_llm_lacks_are_named(make):
    lines: list[str] = []
    make(template="flux2", lines=lines)
    assert any(
        "preset flux2 reads layers 10, 20, 30 of its LLM; this one has 4" in x for x in lines
    )
