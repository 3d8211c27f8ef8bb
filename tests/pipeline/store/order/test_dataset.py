import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from semroute.pipeline.store.features import NULL_CAPTION
from semroute.pipeline.store.open import open_features, open_latents
from semroute.pipeline.store.order.dataset import all_samples, open_pairs, select
from semroute.schemas import DataConfig, InputError, parse
from semroute.trainer.data.loader import PackedLoader


@pytest.fixture(scope="module")
def stores(feature_store, latent_store):
    return open_features(feature_store), open_latents(latent_store)


@pytest.fixture(scope="module")
def lists(texts):
    """60 samples with 1, 2 or 3 captions each."""
    return [texts[3 * n : 3 * n + 1 + n % 3] for n in range(60)]


@pytest.fixture(scope="module")
def several(tmp_path_factory, lists, samples_file, tiny_llm):
    """Stores of these."""
    from semroute.pipeline.extraction.features import extract
    from semroute.pipeline.extraction.latents import encode_images

    folder = tmp_path_factory.mktemp("several")
    images = pyarrow.parquet.read_table(samples_file)["image"].slice(0, 60)
    path = folder / "samples.parquet"
    pyarrow.parquet.write_table(pa.table({"text": lists, "image": images}), path)
    quiet = {"workers": 0, "report": lambda _: None}
    extract(str(path), folder / "features", model=str(tiny_llm), codec="bf16", **quiet)
    encode_images(str(path), folder / "latents", **quiet)
    return open_features(folder / "features"), open_latents(folder / "latents")


@pytest.fixture(scope="module")
def random_stores(random_store, latent_store):
    return open_features(random_store("bf16")), open_latents(latent_store)


def data(**select):
    return parse(DataConfig, {"batch_size": 16, "select": select}, "data")


def chosen(stores, **select_):
    return select(*stores, data(**select_).select)


class TestFilter:
    def test_by_default_all_take_part(self, stores):
        pair = chosen(stores)
        assert pair.selection is None
        assert len(pair.index) == 200

    def test_columns_of_captions(self, stores):
        pair = chosen(stores, filter="num_tokens < 12 and not match_substring(text, pattern='cup')")
        features = stores[0]
        ids = np.array(features.samples["caption_ids"].combine_chunks().values)
        rows = features.captions.take(pa.array(ids)).to_pylist()
        kept = [i for i, r in enumerate(rows) if r["num_tokens"] < 12 and "cup" not in r["text"]]
        assert pair.index.samples.tolist() == kept
        assert pair.index.captions.tolist() == ids[kept].tolist()
        record = pair.selection
        assert (record.num_samples, record.left_out_samples) == (len(kept), 200 - len(kept))
        assert 0 < len(kept) < 200

    def test_columns_of_samples(self, stores):
        last = chosen(stores, filter="sample_id >= 190").index.samples
        assert last.tolist() == [*range(190, 200)]
        assert len(chosen(stores, filter="image == '000007.png'").index) == 1

    @pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
    def test_columns_of_a_file_by_row(self, stores, tmp_path, form):
        path = tmp_path / f"more.{form}"
        values = [n * 7 % 10 for n in range(200)]
        if form == "parquet":
            pyarrow.parquet.write_table(pa.table({"score": values}), path)
        elif form == "csv":
            path.write_text("score\n" + "".join(f"{v}\n" for v in values))
        else:
            path.write_text("".join(json.dumps({"score": v}) + "\n" for v in values))
        pair = chosen(stores, filter="score > 7", columns=str(path))
        assert pair.index.samples.tolist() == [n for n, v in enumerate(values) if v > 7]

    @pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
    def test_columns_beside_large_or_quoted_values(self, stores, tmp_path, form):
        """A row of more than a megabyte, a type that changes later, and a quote in a tsv."""
        path = tmp_path / f"more.{form}"
        values = [1, *[n / 2 for n in range(1, 200)]]
        other = ["x" * 2_000_000 if n == 1 else "y" for n in range(200)]
        if form == "jsonl":
            rows = [json.dumps({"o": o, "score": v}) for o, v in zip(other, values, strict=True)]
        else:
            mark = "," if form == "csv" else "\t"
            other[7] = '"a\nb"' if form == "csv" else '"open'
            rows = [f"o{mark}score"]
            rows += [f"{o}{mark}{v}" for o, v in zip(other, values, strict=True)]
        path.write_text("\ufeff" + "\n".join(rows), "utf-8")
        pair = chosen(stores, filter="score > 98.6", columns=str(path))
        assert pair.index.samples.tolist() == [198, 199]

    @pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl"])
    def test_columns_of_a_file_behind_a_url(self, stores, form):
        """They are read without Arrow's threads, and have the types that a local file gives."""
        table = pa.table({"score": [n / 2 for n in range(200)], "style": ["a", "b"] * 100})
        with fsspec.open(f"memory://columns/more.{form}", "wb") as file:
            if form == "parquet":
                pyarrow.parquet.write_table(table, file)
            elif form == "jsonl":
                file.write("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()).encode())
            else:
                mark = {"csv": ",", "tsv": "\t"}[form]
                rows = [mark.join(map(str, row.values())) for row in table.to_pylist()]
                file.write("\n".join([mark.join(table.column_names), *rows]).encode())
        columns = f"memory://columns/more.{form}"
        pair = chosen(stores, filter="score > 98.6 and style == 'a'", columns=columns)
        assert pair.index.samples.tolist() == [198]
        with pytest.raises(InputError, match=r"no column 'colour'; there are .*score, style"):
            chosen(stores, filter="colour > 1", columns=columns)

    def test_what_cannot_be_fetched_is_refused(self, stores):
        for name, content in {"more.parquet": b"no", "more.jsonl": b"{", "more.txt": b"a"}.items():
            with fsspec.open(f"memory://columns/{name}", "wb") as file:
                file.write(content)
            with pytest.raises(InputError, match=f"{name} cannot be read as parquet, csv or jsonl"):
                chosen(stores, filter="score > 1", columns=f"memory://columns/{name}")
        with pytest.raises(InputError, match=r"gone\.csv cannot be read as parquet, csv or jsonl"):
            chosen(stores, filter="score > 1", columns="memory://columns/gone.csv")

    @pytest.mark.parametrize("place", ["{tmp_path}", "memory://columns"])
    @pytest.mark.parametrize("form", ["parquet", "csv", "tsv"])
    def test_two_columns_of_one_name_are_refused(self, stores, tmp_path, form, place):
        path = place.format(tmp_path=tmp_path) + f"/twice.{form}"
        columns = [pa.array(range(200)), pa.array(range(200))]
        if form == "parquet":
            table = pa.Table.from_arrays(columns, ["score", "score"])
            with fsspec.open(path, "wb") as file:
                pyarrow.parquet.write_table(table, file)
        else:
            mark = "," if form == "csv" else "\t"
            rows = [mark.join(["score", "score"]), *(f"{n}{mark}{n}" for n in range(200))]
            with fsspec.open(path, "w") as file:
                file.write("\n".join(rows))
        named = "multiple columns named score"
        reason = (
            "duplicate field names" if form == "parquet" and place != "memory://columns" else named
        )
        with pytest.raises(InputError, match=f"cannot be read as parquet.*: .*{reason}"):
            chosen(stores, filter="score > 0", columns=path)

    def test_columns_of_other_arrow_types(self, stores, tmp_path):
        style = pa.array(["a" if n == 7 else "b" for n in range(200)])
        columns = [style.dictionary_encode(), style.cast(pa.large_string())]
        if int(pa.__version__.partition(".")[0]) > 18:  # which does not write them
            columns.append(style.cast(pa.string_view()))
        for column in columns:
            pyarrow.parquet.write_table(pa.table({"style": column}), tmp_path / "more.parquet")
            pair = chosen(
                stores,
                filter='match_substring(style, pattern="a")',
                columns=str(tmp_path / "more.parquet"),
            )
            assert pair.index.samples.tolist() == [7]

    def test_columns_of_a_file_by_sample_id(self, stores, tmp_path):
        table = pa.table({"sample_id": [150, 3, 40], "style": ["a", "b", "a"]})
        pyarrow.parquet.write_table(table, tmp_path / "more.parquet")
        pair = chosen(stores, filter="style == 'a'", columns=str(tmp_path / "more.parquet"))
        assert pair.index.samples.tolist() == [40, 150]  # those without a style are left out

    @pytest.mark.parametrize(
        ("select", "message"),
        [
            ({"filter": "score > 1"}, r"no column 'score'; there are .*num_tokens.*data\.columns"),
            ({"filter": "num_tokens > 1000"}, "leaves nothing to train on, of 200 samples"),
            ({"filter": "text > 3"}, "filter 'text > 3': "),
            ({"filter": "num_tokens > 1", "columns": "gone.parquet"}, "cannot be read as parquet"),
            ({"caption_weights": []}, r"caption_weights has 0 numbers, but sample 0 has 1 caption"),
            ({"caption_weights": "text"}, "caption_weights: column 'text'"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, stores, select, message):
        with pytest.raises(InputError, match=message):
            chosen(stores, **select)

    def test_a_file_of_another_length_is_refused(self, stores, tmp_path):
        pyarrow.parquet.write_table(pa.table({"score": [1, 2]}), tmp_path / "more.parquet")
        with pytest.raises(InputError, match=r"has 2 rows but there are 200 samples; give it"):
            chosen(stores, filter="score > 0", columns=str(tmp_path / "more.parquet"))

    def test_a_sample_id_twice_is_refused(self, stores, tmp_path):
        table = pa.table({"sample_id": [1, 1], "score": [1, 2]})
        pyarrow.parquet.write_table(table, tmp_path / "more.parquet")
        with pytest.raises(InputError, match="a sample_id occurs twice"):
            chosen(stores, filter="score > 0", columns=str(tmp_path / "more.parquet"))

    def test_what_is_left_out_never_comes(self, stores):
        stream = PackedLoader(*stores, data(filter="num_tokens < 12"), seed=0, layers=[1])
        captions = np.unique(np.concatenate(stream.captions(0, 2000)))
        tokens = stores[0].captions["num_tokens"].to_numpy()[captions]
        assert tokens.max() < 12
        assert len(captions) > 10

    def test_held_out_samples_are_left_out_too(self, stores):
        pair = chosen(stores, filter="sample_id < 20").without([3, 4, 150])
        assert pair.index.samples.tolist() == [n for n in range(20) if n not in (3, 4)]
        with pytest.raises(InputError, match="all samples are held out"):
            pair.without(range(200))


class TestSeveralCaptions:
    def test_weights_by_number_of_the_caption(self, several):
        index = chosen(several, caption_weights=[1, 0, 3]).index
        counts = np.diff(index.starts)
        assert counts.tolist() == [[1, 1, 2][n % 3] for n in range(60)]
        assert index.weights[:5].tolist() == [1, 1, 1, 3, 1]

    def test_weights_of_a_column(self, several, lists, tmp_path):
        weights = [[float(len(text)) for text in row] for row in lists]
        pyarrow.parquet.write_table(pa.table({"w": weights}), tmp_path / "w.parquet")
        pair = chosen(several, caption_weights="w", columns=str(tmp_path / "w.parquet"))
        texts = several[0].captions["text"].take(pa.array(pair.index.captions)).to_pylist()
        assert pair.index.weights.tolist() == [len(text) for text in texts]
        weights[4] = [1.0]
        pyarrow.parquet.write_table(pa.table({"w": weights}), tmp_path / "w.parquet")
        with pytest.raises(InputError, match="has 1 values for sample 4, which has 2 captions"):
            chosen(several, caption_weights="w", columns=str(tmp_path / "w.parquet"))
        weights[4] = [1.0, -1.0]
        pyarrow.parquet.write_table(pa.table({"w": weights}), tmp_path / "w.parquet")
        with pytest.raises(InputError, match=r"has -1\.0 for sample 4; expected numbers"):
            chosen(several, caption_weights="w", columns=str(tmp_path / "w.parquet"))

    def test_a_filter_leaves_out_single_captions(self, several):
        pair = chosen(several, filter="num_tokens > 12")
        whole = all_samples(*several)
        tokens = several[0].captions["num_tokens"].to_numpy()
        assert (tokens[pair.index.captions] > 12).all()
        record = pair.selection
        assert record.num_captions == (tokens[whole.captions] > 12).sum()
        assert record.left_out_captions == (tokens[whole.captions] <= 12).sum()
        partly = np.diff(pair.index.starts) < np.diff(whole.starts)[pair.index.samples]
        assert partly.any()

    def test_the_fingerprint_is_of_what_is_left(self, several):
        first, again, weighed = (
            chosen(several, filter=text, caption_weights=weights).selection.fingerprint
            for text, weights in (
                ("num_tokens > 12", None),
                ("num_tokens >= 13", None),
                ("num_tokens > 12", [1, 1, 2]),
            )
        )
        assert first == again != weighed


class TestMixture:
    def mixed(self, random_store, latent_store, codec="bf16", **others):
        source = {"features": str(random_store(codec)), "latents": str(latent_store)}
        source |= {"proportion": 0.25, "select": {"filter": "sample_id < 50"}}
        config = {"batch_size": 32, "mixture": [source], **others}
        return parse(DataConfig, config, "data")

    @pytest.mark.parametrize("order", ["random", "shards"])
    @pytest.mark.parametrize("codes", [False, True])
    def test_batches_hold_what_the_stores_hold(
        self, random_stores, random_store, latent_store, order, codes
    ):
        config = self.mixed(random_store, latent_store, "delta", order=order, window=2)
        stream = PackedLoader(*random_stores, config, seed=0, layers=[2, 4], codes=codes)
        counts = np.zeros(2, int)
        for step in range(4):
            batch = stream.read(step).to("cpu")
            counts += np.bincount(batch.sources, minlength=2)
            for n, (source, sample) in enumerate(zip(batch.sources, batch.sample_ids, strict=True)):
                pair = stream.pairs[source]
                own = pair.features.samples["caption_ids"][int(sample)].as_py()
                rows = batch.hidden[slice(*batch.offsets[batch.caption[n] :][:2])].float().numpy()
                allowed = [
                    pair.features.read([c], [2, 4]).tensor().float().numpy()
                    for c in (NULL_CAPTION, *own)
                ]
                assert any(
                    rows.shape == a.shape and np.array_equal(rows, a, equal_nan=True)
                    for a in allowed
                )
                latent = pair.latents.read([sample])[0]
                assert np.array_equal(batch.latents[n].numpy(), latent)
                assert source == 0 or sample < 50
            names = batch.names()
            assert names[0] == f"{batch.sources[0]}:{batch.sample_ids[0]}"
        assert counts.tolist() == pytest.approx([96, 32], abs=12)

    def test_what_is_mixed_is_recorded(self, random_stores, random_store, latent_store):
        first, second = open_pairs(*random_stores, self.mixed(random_store, latent_store))
        assert first.selection is None
        record = second.record()
        assert record.features == second.features.manifest.identity
        assert record.selection.num_samples == 50
        assert second.proportion == 0.25

    def test_features_of_another_model_are_refused(
        self, feature_store, random_stores, random_store, latent_store
    ):
        config = self.mixed(random_store, latent_store)
        with pytest.raises(InputError, match=r"cannot be mixed with .*(?s:.)*model\.files"):
            open_pairs(open_features(feature_store), random_stores[1], config)
