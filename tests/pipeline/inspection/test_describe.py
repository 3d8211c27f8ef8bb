import json
import shutil

import pytest

from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_features
from semroute.schemas import Quarantine


def test_features_are_described_for_people_and_machines(feature_store):
    found = inspect(feature_store)
    details = json.loads(found.to_json())
    store = open_features(feature_store)
    assert details["captions"] == 193
    assert details["tokens"] == sum(store.captions["num_tokens"].to_pylist())
    assert details["bytes_per_token"] == 2 * 4 * 32
    assert details["bytes_padded_bf16"] == 193 * details["tokens_longest"] * 2 * 4 * 32
    ratio = details["bytes_padded_bf16"] / details["bytes"]
    assert details["ratio_to_padded_bf16"] == ratio > 1
    assert details["status"] == "complete"
    assert details["codec_error"]["mean"] < details["codec_error"]["max"] < 2**-7
    assert details["manifest"] == json.loads((feature_store / "manifest.json").read_text())
    text = str(found)
    for expected in ("'{bos}{caption}'", "1-4", "193 unique", "bf16", f"{ratio:.2f}x less"):
        assert expected in text
    assert found._repr_html_().count("<tr>") == len(found.facts.items)


def test_latents_are_described_too(latent_store):
    details = inspect(latent_store).details
    assert details["format"] == "semroute.latents"
    assert details["shards_written"] == details["shards"] > 1


def test_an_unfinished_store_says_what_is_missing_and_why(feature_store, tmp_path):
    store = shutil.copytree(feature_store, tmp_path / "store")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
    (store / "receipts" / "shard-000000.json").unlink()
    opened = open_features(store, complete=False)
    opened.write_quarantine(Quarantine(shard=0, entries=[0], reason="it broke", traceback=""))
    found = inspect(store)
    assert found.details["shards_written"] == found.details["shards"] - 1
    assert found.details["quarantined"] == {0: "it broke"}
    assert "extracting" in str(found)
    assert "shard 0: it broke" in str(found)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="it has no manifest"):
        inspect(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match=r"format is 'other'; expected one of semroute\.features"):
        inspect(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(StoreError):
        inspect(tmp_path)
