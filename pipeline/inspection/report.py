"""A store as a self-contained page of HTML: facts, figures and a search over captions. It follows
a light or dark theme, and loads nothing."""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...schemas import check_writable, write_document
from ...schemas.escaping import in_html
from ..codecs.error import layer_error
from ..models.vae import latents_to_images, pixel_codec
from ..store.features import NULL_CAPTION, FeatureStore
from ..store.latents import LatentStore
from ..store.open import open_store
from ..style import Figure, themed_svg
from . import figures
from .describe import inspect
from .statistics import LayerStatistics, measure_layers

MAX_TEXT_BYTES = 8_000_000
"""Bytes of captions that a page holds for its search."""
NUM_IMAGES = 48
"""Number of images of a latent store that a page shows."""


_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Section:
    """Part of the page; two stand side by side unless one is wide."""

    title: str
    html: str
    wide: bool = False

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def write_report(path: str | os.PathLike[str], out: Path) -> Path:
    """Describe a store, finished or not, as a page of HTML.

    Features of a complete store are measured on a sample, see
    :func:`semroute.measure_layers`.

    Raises:
        StoreError: no store there.
    """
    check_writable(out)
    store, report = open_store(path), inspect(path)
    sections = [_Section("Facts", report.facts._repr_html_(), wide=True)]
    if isinstance(store, FeatureStore):
        sections += _features(store)
    elif isinstance(store, LatentStore) and len(store):
        sections += _images(store)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_document(out, _page(report.facts.title, sections))
    return out


def _features(store: FeatureStore) -> list[_Section]:
    """Figures and tables of a feature store, section by section."""
    lengths = _svg(figures.token_lengths(store), "number of captions by tokens per caption")
    sections = [_Section("Tokens per caption", lengths)]
    errors = layer_error(list(store.receipts().values()))
    if errors and max(errors.values()) > 0:
        figure = figures.error_by_layer(errors, store.manifest.codec.name)
        sections.append(_Section("Error of the codec", _svg(figure, "error of LN(h) by layer")))
    if store.is_complete:
        measured = measure_layers(store)
        sample = f"{measured.num_rows:,} tokens of {measured.num_captions:,} captions"
        massive = _svg(figures.massive_activations(measured), "massive activations by layer")
        sections += [
            _Section(
                "Norms",
                _svg(figures.norms(measured), "norms of hidden states by layer")
                + f"<p>Norms, massive activations and similarity are measured on {sample}.</p>",
            ),
            _Section(
                "Similarity of layers",
                _svg(figures.similarity(measured), "similarity of every two layers"),
            ),
            _Section("Massive activations", massive + _massive(measured)),
            _Section("One caption", _one_caption(store), wide=True),
        ]
    return [*sections, _Section("Captions", _search(store), wide=True)]


def _one_caption(store: FeatureStore) -> str:
    """Heatmaps of the first caption in store order, which is random."""
    caption = store[min(NULL_CAPTION + 1, len(store) - 1)]
    figure = figures.caption_layers(caption, store.layers)
    note = (
        f"<p>Caption {caption.caption_id}. In Python, <code>semroute.explore</code> shows any "
        "other.</p>"
    )
    return _svg(figure, "tokens of a caption by layers") + note


def _massive(measured: LayerStatistics) -> str:
    """Table of the layers with massive activations, and their channels."""
    rows = "".join(
        f"<tr><td>{layer}</td><td>{100 * share:.2f} %</td>"
        f"<td>{', '.join(map(str, channels))}</td></tr>"
        for layer, share, channels in zip(
            measured.layers, measured.massive_rows, measured.massive_channels, strict=True
        )
        if channels
    )
    rule = "over 100 and over 1,000 times the median of its vector"
    if not rows:
        return f"<p>No activation of the sample is massive ({rule}).</p>"
    head = "<tr><th>layer</th><th>tokens with a massive activation</th><th>channels</th></tr>"
    return f"<p>Massive: {rule}.</p><table>{head}{rows}</table>"


def _search(store: FeatureStore) -> str:
    """Field to search the captions, with their data."""
    columns = [store.captions[name].to_pylist() for name in ("caption_id", "num_tokens", "text")]
    rows, size = [], 0
    for row in zip(*columns, strict=True):
        size += len(row[2].encode()) + 16
        if size > MAX_TEXT_BYTES:
            break
        rows.append(row)
    left = len(store) - len(rows)
    note = f" The page holds the first {len(rows):,} of {len(store):,} captions." if left else ""
    # Without this character, no caption can close the script.
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f"<p>Finds captions that contain all words. Press / to search.{in_html(note)}</p>"
        '<p><input id="words" type="search" placeholder="search" aria-label="search captions"> '
        '<span id="count" role="status"></span></p><table id="found"><thead><tr>'
        '<th scope="col">id</th><th scope="col">tokens</th><th scope="col">caption</th></tr>'
        '</thead><tbody></tbody></table><p><button id="more" type="button">Show 50 more</button>'
        f'</p><script id="rows" type="application/json">{data}</script>'
        f"<script>{(_HERE / 'report.js').read_text('utf-8')}</script>"
    )


def _images(store: LatentStore) -> list[_Section]:
    """The first images of a latent store, if it is complete and its latents are pixels."""
    if store.manifest.identity.vae != "pixels" or not store.is_complete:
        return []
    codec = pixel_codec()
    images = [
        latents_to_images(store.read([sample]), codec.scale, codec.shift)[0]
        for sample in store.ids[:NUM_IMAGES]
    ]
    shown = "".join(f"<img class='sample' src='{_png(image)}' alt=''>" for image in images)
    return [_Section("First images", shown, wide=True)]


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _svg(figure: Figure, name: str) -> str:
    data = base64.b64encode(themed_svg(figure).encode()).decode()
    return f"<img src='data:image/svg+xml;base64,{data}' alt='{in_html(name)}'>"


def _page(title: str, sections: Sequence[_Section]) -> str:
    contents = "".join(f'<li><a href="#{s.anchor}">{s.title}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}"{" class=wide" * s.wide}><h2>{s.title}</h2>{s.html}</section>'
        for s in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{in_html(title)}</title>'
        f"<style>{(_HERE / 'report.css').read_text('utf-8')}</style></head>"
        f'<body><h1>{in_html(title)}</h1><nav aria-label="contents"><ul>{contents}</ul></nav>'
        f"<main>{body}</main></body></html>\n"
    )
