import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_stores

from semroute.pipeline.inspection.statistics import measure_caption
from semroute.pipeline.store.open import open_features
from semroute.schemas import InputError
from semroute.trainer.explorer.features import FeaturesView


@pytest.fixture(scope="module")
def store(feature_store):
    return open_features(feature_store)


@pytest.fixture(scope="module")
def view(store):
    return FeaturesView(store, sample=60)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def normed(hidden):
    return (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)


def test_search_lists_captions_with_all_words(view, store):
    found = view.search("CUP red")
    assert found["count"] == len(found["captions"]) == 4
    for caption, num_tokens, text in found["captions"]:
        assert store.captions["text"][caption].as_py() == text
        assert store.captions["num_tokens"][caption].as_py() == num_tokens
        assert {"red", "cup"} <= {*text.split()}
    everything = view.search(" ")
    assert (everything["count"], len(everything["captions"])) == (193, 100)
    assert everything["captions"][0][2] == "(the null caption)"


def test_a_caption_is_found_by_its_text(view, store):
    text = store.captions["text"][17].as_py()
    assert view.find(text) == {"caption": 17}
    assert view.find("no such caption") == {"caption": None}


def test_a_caption_is_measured_token_by_token(view, store):
    hidden, answer = store[5].hidden, view.caption(5)
    assert answer["exact"] == answer["text"] == store[5].text
    layers = normed(hidden)
    np.testing.assert_allclose(answer["norm"], np.linalg.norm(hidden, axis=2), rtol=1e-5)
    np.testing.assert_allclose(
        answer["similarity"], cosine(layers, layers[:, -1:]), rtol=1e-4, atol=1e-5
    )
    moved = np.linalg.norm(layers[:, 2] - layers[:, 1], axis=1)
    np.testing.assert_allclose(
        answer["change"][:, 2], moved / np.linalg.norm(layers[:, 1], axis=1), rtol=1e-4
    )
    assert np.isnan(answer["change"][:, 0]).all()
    assert "".join(answer["tokens"]) == store[5].text  # a token is a byte
    with pytest.raises(InputError, match="no caption 193; the store has 0 to 192"):
        view.caption(193)


def test_a_caption_of_zeros_has_numbers():
    measured = measure_caption(np.zeros((2, 3, 4), np.float32))
    assert (measured.norm == 0).all()
    assert (measured.similarity == 0).all()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_nearest_captions_are_those_of_the_largest_cosine(view, store, pool):
    answer = view.nearest(5, 3, pool)
    assert answer["sample"] == 60
    pooled = []
    for caption in range(1, 61):
        layer = normed(store[caption].hidden[:, 2])
        pooled.append(layer.mean(0) if pool == "mean" else layer[-1])
    centred = np.array(pooled) - np.mean(pooled, 0)
    expected = cosine(centred, centred[4])
    expected[4] = -1
    order = np.argsort(-expected)[:12] + 1
    assert len(answer["captions"]) == 12
    found = [row[3] for row in answer["captions"]]
    np.testing.assert_allclose(found, expected[order - 1], atol=5e-3)
    assert 5 not in [row[0] for row in answer["captions"]]
    assert answer["captions"][0][0] == order[0]


def test_layers_are_compared_once(view, monkeypatch):
    first = view.similarity()
    assert first["cka"].shape == first["cosine"].shape == (4, 4)
    monkeypatch.setattr("semroute.trainer.explorer.features.measure_layers", None)
    assert view.similarity() == first


def test_a_layer_that_is_not_stored_is_refused(view):
    with pytest.raises(InputError, match="layer 9 is not stored"):
        view.nearest(5, 9, "mean")


@pytest.fixture
def changed(feature_store, tmp_path):
    """Place in the manifest and its new value -> such a store."""

    def changed(place, value):
        path = shutil.copytree(feature_store, tmp_path / "store")
        tiny_stores.edit(path, "manifest.json", place, value)
        tiny_stores.seal(path)
        return open_features(path)

    return changed


def test_tokens_have_numbers_without_their_tokenizer(changed):
    view = FeaturesView(changed("provenance.model", "somebody/not-here@abc"))
    assert not view.facts()["named"]
    assert view.caption(5)["tokens"][:2] == ["token 1", "token 2"]


def test_a_store_is_explored_without_torch(changed):
    store = changed("provenance.model", "somebody/not-here@abc")
    code = (
        "import sys; sys.modules['torch'] = None; import semroute; "
        f"(side,) = semroute.explore({str(store.path)!r}).sides; "
        "print(side.answer('nearest', {'caption': 5, 'layer': 3, 'pool': 'mean'})['sample'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "192\n", done.stderr


def test_another_tokenizer_is_refused(changed, tiny_llm):
    store = changed("identity.tokenizer", "0" * 64)
    with pytest.raises(InputError, match="is not that of"):
        FeaturesView(store, tokenizer=str(tiny_llm))
    assert not FeaturesView(store).facts()["named"]
    with pytest.raises(InputError, match="no such folder or file"):
        FeaturesView(store, tokenizer="./nowhere")
