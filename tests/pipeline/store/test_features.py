import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zarr

import semroute
from semroute.pipeline.store.documents import (
    GROUP_ROWS,
    StoreError,
    prepare_folder,
    render_table,
)
from semroute.pipeline.store.features import FeatureStore
from semroute.pipeline.store.latents import LatentStore
from semroute.schemas import Quarantine


class StoreContract:
    """Tests of every kind of store; ``store`` is the path of a complete one that may be changed."""

    kind: type[FeatureStore] | type[LatentStore]

    def test_it_opens_and_says_what_it_is(self, store):
        opened = self.kind.open(store)
        text, html = repr(opened), opened._repr_html_()
        assert text.startswith(f"{self.kind.__name__} {store}")
        for name, value in opened.summary().items.items():
            assert f"{name} " in text
            assert value in text
            assert f">{name}</th>" in html

    def test_nothing_remains_of_a_complete_store(self, store):
        assert self.kind.open(store).remaining() == []

    def test_a_folder_without_a_manifest_is_no_store(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(StoreError, match="it has no manifest"):
                self.kind.open(path)

    def test_the_other_kind_is_refused(self, feature_store, latent_store):
        other = latent_store if self.kind is FeatureStore else feature_store
        with pytest.raises(StoreError, match=f"is no {self.kind.kind} store: its manifest says"):
            self.kind.open(other)

    def test_a_damaged_manifest_is_named(self, store):
        path = store / "manifest.json"
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            self.kind.open(store)
        path.write_text(text.replace('"layout"', '"layuot"'))
        with pytest.raises(ValueError, match="layuot: unknown key; did you mean 'layout'"):
            self.kind.open(store)

    def test_what_has_no_receipt_or_no_file_remains(self, store):
        manifest = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
        (store / "receipts" / "shard-000001.json").unlink()
        receipt = self.kind.open(store, complete=False).receipts()[2]
        (store / next(iter(receipt.files))).unlink()
        opened = self.kind.open(store, complete=False)
        assert opened.remaining() == [1, 2]
        num = manifest["layout"]["num_shards"]
        assert f"extracting: {num - 2} of {num} shards written" in repr(opened)
        with pytest.raises(StoreError, match=f"is not finished: 2 of {num} shards"):
            self.kind.open(store)
        with pytest.raises(StoreError, match="2 shards remain"):
            opened.finish()

    def test_files_that_went_later_are_missed_when_asked_for(self, store):
        opened = self.kind.open(store)
        opened.check_complete(files=True)
        (store / next(iter(opened.receipts()[0].files))).unlink()
        opened.check_complete()
        num = opened.manifest.layout.num_shards
        with pytest.raises(StoreError, match=f"is not finished: 1 of {num} shards"):
            opened.check_complete(files=True)

    def test_a_receipt_lifts_the_quarantine(self, store):
        opened = self.kind.open(store)
        entry = Quarantine(shard=1, entries=[4, 5], reason="because", traceback="")
        opened.write_quarantine(entry)
        assert opened.quarantined() == {1: entry}
        opened.write_receipt(opened.receipts()[1])
        assert opened.quarantined() == {}

    def test_another_identity_is_refused_key_by_key(self, store):
        opened = self.kind.open(store)
        opened.check_same(opened.manifest)
        identity = opened.manifest.identity
        samples = identity.samples.model_copy(update={"num_samples": 7})
        layout = opened.manifest.layout.model_copy(update={"rows_per_shard": 1})
        other = opened.manifest.model_copy(
            update={"identity": identity.model_copy(update={"samples": samples}), "layout": layout}
        )
        with pytest.raises(StoreError) as error:
            opened.check_same(other)
        assert "identity.samples.num_samples: 7 instead of 200" in str(error.value)
        rows = opened.manifest.layout.rows_per_shard
        assert f"layout.rows_per_shard: 1 instead of {rows}" in str(error.value)

    def test_a_foreign_folder_is_never_touched(self, tmp_path):
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(StoreError, match=r"is not empty.*precious\.txt"):
            prepare_folder(tmp_path, self.kind.kind, self.kind.group, ())
        assert (tmp_path / "precious.txt").read_text() == "mine"

    def test_shards_without_a_manifest_are_never_deleted(self, store):
        tables = ("captions.parquet", "samples.parquet")
        (store / "manifest.json").unlink()
        shutil.rmtree(store / "receipts")
        with pytest.raises(StoreError, match=r"holds shards but no manifest"):
            prepare_folder(store, self.kind.kind, self.kind.group, tables)


class TestFeatureStore(StoreContract):
    kind = FeatureStore

    @pytest.fixture
    def store(self, feature_store, tmp_path):
        return shutil.copytree(feature_store, tmp_path / "store")

    def test_captions_come_with_text_tokens_and_hidden_states(self, feature_store, texts):
        store = semroute.open_features(feature_store)
        assert len(store) == 193 == len(list(store))
        assert store[0].text == ""
        assert store[0].tokens == [0]  # BOS: the null caption keeps its prefix
        caption = store[7]
        assert caption.text in texts
        assert caption.hidden.shape == (len(caption.tokens), 4, 32) == (len(caption.text), 4, 32)
        assert store[-1].caption_id == 192
        with pytest.raises(IndexError, match="no caption 193; the store has 0 to 192"):
            store[193]

    def test_samples_point_to_their_captions(self, feature_store, texts):
        store = semroute.open_features(feature_store)
        stored = store.captions["text"].to_pylist()
        ids = store.samples["caption_ids"].to_pylist()
        assert [[stored[i] for i in row] for row in ids] == [[text] for text in texts]
        assert store.samples["image"][3].as_py() == "000003.png"

    def test_first_captions_are_those_of_the_file_it_was_extracted_from(self, feature_store, texts):
        store = semroute.open_features(feature_store)
        rows = store.samples["caption_ids"].to_pylist()
        assert store.first_captions.tolist() == [row[0] for row in rows]
        store.check_source("samples.parquet", texts)
        store.check_source("samples.parquet", texts[:5], first_rows=True)
        message = r"store was not extracted from other\.parquet: the captions differ\. Name that\.$"
        for other in (texts[:5], [*texts, "more"], texts[::-1]):
            with pytest.raises(StoreError, match=message):
                store.check_source("other.parquet", other, remedy="Name that.")
        for other in (texts[1:5], [*texts, "more"]):
            with pytest.raises(StoreError, match=r"the captions differ\.$"):
                store.check_source("other.parquet", other, first_rows=True)

    def test_reading_packs_captions_in_the_order_asked_for(self, feature_store):
        store = semroute.open_features(feature_store)
        ids = [50, 3, 3, 192, 0]
        rows = store.read(ids)
        for position, caption_id in enumerate(ids):
            part = rows.numpy()[rows.offsets[position] : rows.offsets[position + 1]]
            np.testing.assert_array_equal(part, store[caption_id].hidden)
        some = store.read(ids, layers=[4, 2])
        np.testing.assert_array_equal(some.bits, rows.bits[:, [3, 1]])

    def test_a_buffer_is_reused(self, feature_store):
        store = semroute.open_features(feature_store)
        out = np.empty((1000, 4, 32), np.uint16)
        rows = store.read([5, 6], out=out)
        assert np.shares_memory(rows.bits, out)
        np.testing.assert_array_equal(rows.bits, store.read([5, 6]).bits)
        with pytest.raises(ValueError, match=r"expected uint16 \[rows, 4, 32\]"):
            store.read([5], out=out.astype(np.uint8))
        with pytest.raises(ValueError, match="out has 1 rows; "):
            store.read([5, 6], out=out[:1])

    def test_codes_are_read_into_memory_that_is_given(self, random_store):
        store, given = semroute.open_features(random_store("linear")), []

        def empty(shape, dtype):
            given.append(np.empty(shape, dtype))
            return given[-1]

        found = store.read_codes([3, 1, 2], [2, 4], empty=empty)
        expected = store.read_codes([3, 1, 2], [2, 4])
        assert [id(array) for array in found.arrays.values()] == [id(array) for array in given]
        assert [*found.arrays] == ["code", "escape", "scalar"]
        for name, array in expected.arrays.items():
            assert np.array_equal(found.arrays[name], array)

    def test_what_is_not_stored_is_named(self, feature_store):
        store = semroute.open_features(feature_store)
        with pytest.raises(StoreError, match=r"layer 9 is not stored; .* has \[1, 2, 3, 4\]"):
            store.read([1], layers=[9])
        with pytest.raises(StoreError, match="193 asked for; the store has 0 to 192"):
            store.read([1, 193])

    def test_torch_sees_bfloat16(self, feature_store):
        torch = pytest.importorskip("torch")
        rows = semroute.open_features(feature_store).read([1, 2])
        assert rows.tensor().dtype == torch.bfloat16
        np.testing.assert_array_equal(rows.tensor().float().numpy(), rows.numpy())

    def test_any_zarr_implementation_reads_the_same_numbers(self, feature_store):
        tensorstore = pytest.importorskip("tensorstore")
        xarray = pytest.importorskip("xarray")
        store = semroute.open_features(feature_store)
        last = store.captions.slice(192, 1).to_pylist()[0]
        start, stop = last["row_start"], last["row_stop"]
        expected = store.read([192]).bits
        group = zarr.open_group(feature_store / "hidden.zarr", mode="r")
        np.testing.assert_array_equal(group["hidden"][start:stop], expected)
        assert group["layer"][:].tolist() == [1, 2, 3, 4]
        path = str(feature_store / "hidden.zarr" / "hidden")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        array = tensorstore.open(spec, read=True).result()
        np.testing.assert_array_equal(array[start:stop].read().result(), expected)
        data = xarray.open_zarr(feature_store / "hidden.zarr", consolidated=False)
        assert data["hidden"].dims == ("row", "layer", "channel")
        np.testing.assert_array_equal(data["hidden"].isel(row=slice(start, stop)).values, expected)
        np.testing.assert_array_equal(data["hidden"].sel(layer=3)[start:stop], expected[:, 2])


class TestLatentStore(StoreContract):
    kind = LatentStore

    @pytest.fixture
    def store(self, latent_store, tmp_path):
        return shutil.copytree(latent_store, tmp_path / "store")

    def test_latents_are_the_images(self, latent_store, samples_file):
        import io

        from PIL import Image

        from semroute.pipeline.models.vae import latents_to_images

        store = semroute.open_latents(latent_store)
        assert len(store) == 200
        ids = [199, 0, 57, 57]
        latents = store.read(ids)
        assert latents.shape == (4, 3, 12, 12)
        assert latents.dtype == np.float32
        assert latents.min() >= -1
        assert latents.max() <= 1.0000001
        rows = pyarrow.parquet.read_table(samples_file)["image"].to_pylist()
        expected = [np.asarray(Image.open(io.BytesIO(rows[i]["bytes"]))) for i in ids]
        identity = store.manifest.identity
        np.testing.assert_array_equal(
            latents_to_images(latents, identity.scale, identity.shift), expected
        )

    def test_samples_that_do_not_exist_are_named(self, latent_store):
        with pytest.raises(StoreError, match="200 asked for; the store has 0 to 199"):
            semroute.open_latents(latent_store).read([200])


class TestSearch:
    def test_every_word_must_occur_in_any_order_and_case(self, feature_store):
        store = semroute.open_features(feature_store)
        found = store.search("SMALL red")
        assert found["text"].to_pylist() == [
            text for text in store.captions["text"].to_pylist() if "red small dog" in text
        ]
        assert found.num_rows == 4
        caption = store[found["caption_id"][0].as_py()]
        assert caption.text == found["text"][0].as_py()

    def test_what_does_not_occur_is_not_found(self, feature_store):
        store = semroute.open_features(feature_store)
        assert store.search("re. d").num_rows == 0  # words are not patterns
        assert store.search("").num_rows == len(store)


class TestLazyArrays:
    @pytest.fixture
    def store(self, random_store, monkeypatch):
        """A store whose codec makes layers depend on each other, in blocks of few captions."""
        pytest.importorskip("dask.array")
        monkeypatch.setattr("semroute.pipeline.store.views.DASK_BYTES", 40_000)
        return semroute.open_features(random_store("delta"))

    @pytest.mark.parametrize("layers", [None, [3], [4, 2]])
    def test_dask_gives_what_read_gives(self, store, layers):
        lazy = store.to_dask(layers)
        assert lazy.numblocks[0] > 5
        assert lazy.dtype == np.float32
        assert {max(block) for block in lazy.chunks[1:]} == {lazy.shape[1], 32}
        expected = store.read(range(len(store)), layers).numpy()
        np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), expected)
        np.testing.assert_array_equal(lazy[100:200, 0].compute(), expected[100:200, 0])

    def test_blocks_are_read_in_other_processes_too(self, store):
        store.read([0])  # what it has opened is not sent along
        mean = store.to_dask([1]).mean().compute(scheduler="processes", num_workers=1)
        assert mean == pytest.approx(store.read(range(len(store)), [1]).numpy().mean(), rel=1e-4)

    def test_xarray_names_what_a_row_is(self, store):
        pytest.importorskip("xarray")
        dataset = store.to_xarray([2, 4])
        assert dataset.hidden.dims == ("row", "layer", "channel")
        rows = dataset.sel(layer=4).isel(row=np.flatnonzero(dataset.caption == 7))
        caption = store[7]
        np.testing.assert_array_equal(rows.hidden.values, caption.hidden[:, 3])
        assert rows.token.values.tolist() == caption.tokens
        assert rows.position.values.tolist() == list(range(len(caption.tokens)))
        assert dataset.attrs["codec"] == "delta"


@pytest.mark.parametrize("block", [GROUP_ROWS, GROUP_ROWS // 4])
def test_tables_are_written_a_group_of_rows_at_a_time(block):
    num = 2 * GROUP_ROWS + 5
    table = pa.table({"n": np.arange(num), "text": pa.array(np.arange(num)).cast(pa.string())})
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(block))
    content = render_table(reader)
    assert content == render_table(table)
    metadata = pyarrow.parquet.read_metadata(io.BytesIO(content))
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert counts == [GROUP_ROWS, GROUP_ROWS, 5]
