import json
import re
import shutil

import numpy as np
import pytest
from figure_checks import untitled

from semroute.pipeline.codecs.error import layer_error
from semroute.pipeline.inspection import figures
from semroute.pipeline.inspection.describe import inspect
from semroute.pipeline.inspection.report import write_report
from semroute.pipeline.inspection.statistics import measure_caption, measure_layers
from semroute.pipeline.store.documents import StoreError
from semroute.pipeline.store.open import open_features
from semroute.pipeline.style import readable, themed_svg


def texts(figure):
    figure.draw_without_rendering()
    found = figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    return [artist.get_text() for artist in found]


def headings(page):
    return re.findall(r"<h2>(.+?)</h2>", page)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scene.objects.0.colour", "object 1: colour"),
        ("scene.objects.11.text_size", "object 12: text size"),
        ("scene.kind", "scene kind"),
        ("word", "word"),
        ("0.kind", "0 kind"),
        ("boxes.3", "boxes 3"),
    ],
)
def test_nested_labels_are_said_as_people_do(name, said):
    assert readable(name) == said


@pytest.fixture(scope="module")
def made(feature_store):
    """All figures of a page."""
    store = open_features(feature_store)
    measured = measure_layers(store)
    return [
        figures.norms(measured),
        figures.massive_activations(measured),
        figures.similarity(measured),
        figures.error_by_layer({1: 0.5, 2: 0.25}, "delta"),
        figures.token_lengths(store),
        figures.caption_layers(store[7], store.layers),
    ]


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

    def test_a_caption_has_a_row_per_token(self, feature_store):
        store = open_features(feature_store)
        caption = store[7]
        figure = figures.caption_layers(caption, store.layers)
        measured = measure_caption(caption.hidden)
        shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
        expected = (measured.norm, measured.change, measured.similarity)
        for image, values in zip(shown, expected, strict=True):
            np.testing.assert_array_equal(np.ma.filled(image, np.nan), values)
        assert caption.text in texts(figure)

    def test_axes_and_colour_bars_have_titles(self, made):
        assert [untitled(figure) for figure in made] == [[]] * len(made)

    def test_every_colour_of_a_page_has_one_for_a_dark_theme(self, made):
        for figure in made:
            drawn = re.sub(r"<style>:root.*?</style>", "", themed_svg(figure))
            assert re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]+", drawn) == []

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
            "Similarity of layers",
            "Massive activations",
            "One caption",
            "Captions",
        ]
        contents = re.findall(r'<li><a href="#([\w-]+)">(.+?)</a>', page)
        assert [title for _, title in contents] == headings(page)
        assert all(page.count(f'id="{anchor}"') == 1 for anchor, _ in contents)
        for value in inspect(feature_store).facts.items.values():
            assert value.replace("'", "&#x27;") in page
        assert page.count("data:image/svg+xml;base64,") == 6
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
