import json
import re
import shutil

import pytest

from semroute.pipeline.codecs.error import layer_error
from semroute.pipeline.inspection import figures
from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.inspection.report import write_report
from semroute.pipeline.inspection.statistics import measure_layers
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_features


def texts(figure):
    figure.draw_without_rendering()
    found = figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    return [artist.get_text() for artist in found]


def headings(page):
    return re.findall(r"<h2>(.+?)</h2>", page)


class TestFigures:
    @pytest.mark.parametrize("name", ["norms", "massive_activations", "similarity"])
    def test_they_name_their_layers(self, name, feature_store):
        figure = getattr(figures, name)(measure_layers(open_features(feature_store)))
        found = texts(figure)
        assert {"LLM layer", "1", "2", "3", "4"} <= set(found)

    def test_errors_are_those_of_the_receipts(self, feature_store):
        errors = layer_error(list(open_features(feature_store).receipts().values()))
        assert list(errors) == [1, 2, 3, 4]
        figure = figures.error_by_layer(errors, "bf16")
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        assert heights == list(errors.values())
        assert inspect(feature_store).details["layer_error"] == errors

    def test_every_caption_is_counted_once(self, feature_store):
        store = open_features(feature_store)
        bars = figures.token_lengths(store).axes[0].patches
        assert sum(bar.get_height() for bar in bars) == len(store)


class TestPage:
    def test_it_has_facts_figures_and_captions(self, feature_store, tmp_path):
        page = write_report(feature_store, tmp_path / "new" / "page.html").read_text("utf-8")
        assert headings(page) == [
            "Facts",
            "Tokens per caption",
            "Error of the codec",
            "Norms",
            "Massive activations",
            "Similarity of layers",
            "Captions",
        ]
        for value in inspect(feature_store).facts.items.values():
            assert value.replace("'", "&#x27;") in page
        assert page.count("data:image/svg+xml;base64,") == 5
        assert "http" not in re.sub(r"base64,[^']+", "", page)  # nothing is fetched
        rows = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])
        store = open_features(feature_store)
        assert [row[2] for row in rows] == store.captions["text"].to_pylist()

    def test_captions_cannot_break_the_page(self, feature_store, tmp_path, monkeypatch):
        store = shutil.copytree(feature_store, tmp_path / "store")
        import pyarrow as pa
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(store / "captions.parquet")
        texts = table["text"].to_pylist()
        texts[1] = "</script><script>alert(1)</script>"
        place = table.schema.get_field_index("text")
        table = table.set_column(place, table.schema.field(place), pa.array(texts))
        pyarrow.parquet.write_table(table, store / "captions.parquet")
        (store / "checksums.json").unlink()  # as if by an early version, which sealed no receipts
        for file in (store / "receipts").iterdir():
            file.write_text(json.dumps({**json.loads(file.read_text()), "sha256": ""}))
        page = write_report(store, tmp_path / "page.html").read_text("utf-8")
        assert "<script>alert" not in page
        assert json.dumps(texts[1]).replace("<", "\\u003c") in page
        monkeypatch.setattr("semroute.pipeline.inspection.report.MAX_TEXT_BYTES", 500)
        page = write_report(store, tmp_path / "page.html").read_text("utf-8")
        assert re.search(r"The page holds the first \d+ of 193 captions", page)

    def test_an_unfinished_store_has_a_page_too(self, feature_store, tmp_path):
        store = shutil.copytree(feature_store, tmp_path / "store")
        manifest = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(json.dumps(manifest | {"status": "extracting"}))
        (store / "receipts" / "shard-000000.json").unlink()
        page = write_report(store, tmp_path / "page.html").read_text("utf-8")
        assert "extracting" in page
        assert "Norms" not in headings(page)

    def test_latents_show_their_first_images(self, latent_store, tmp_path):
        page = write_report(latent_store, tmp_path / "page.html").read_text("utf-8")
        assert headings(page) == ["Facts", "First images"]
        assert page.count("data:image/png;base64,") == 48

    def test_no_store_no_page(self, tmp_path):
        with pytest.raises(StoreError, match="it has no manifest"):
            write_report(tmp_path, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()
