"""A store as a self-contained page of HTML: facts, figures and a search over captions."""

import base64
import io
import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ...schemas import Report, write_document
from ..codecs.error import layer_error
from ..models.vae import latents_to_images, pixel_codec
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.open import open_store
from ..style import Figure
from . import figures
from .describe import inspect
from .statistics import LayerStatistics, measure_layers

MAX_TEXT_BYTES = 4_000_000
"""Bytes of captions that a page holds for its search."""
NUM_IMAGES = 48
"""Number of images of a latent store that a page shows."""


def write_report(path: str | os.PathLike[str], out: Path) -> Path:
    """Describe a store, finished or not, as a page of HTML.

    Features of a complete store are measured on a sample, see
    :func:`semroute.measure_layers`.

    Raises:
        StoreError: no store there.
    """
    store, report = open_store(path), inspect(path)
    sections = [("Facts", report.facts._repr_html_())]
    if isinstance(store, FeatureStore):
        sections += _features(store)
    elif isinstance(store, LatentStore) and len(store):
        sections += _images(store)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_document(out, _page(report, dict(sections)))
    return out


def _features(store: FeatureStore) -> list[tuple[str, str]]:
    """Figures and tables of a feature store, section by section."""
    sections = [("Tokens per caption", _svg(figures.token_lengths(store), "token lengths"))]
    errors = layer_error(list(store.receipts().values()))
    if errors and max(errors.values()) > 0:
        figure = figures.error_by_layer(errors, store.manifest.codec.name)
        sections.append(("Error of the codec", _svg(figure, "error by layer")))
    if store.is_complete:
        measured = measure_layers(store)
        sample = f"{measured.num_rows:,} tokens of {measured.num_captions:,} captions"
        sections += [
            (
                "Norms",
                f"<p>Here and below, measured on {sample}.</p>"
                + _svg(figures.norms(measured), "norms by layer"),
            ),
            (
                "Massive activations",
                _svg(figures.massive_activations(measured), "massive activations by layer")
                + _massive(measured),
            ),
            ("Similarity of layers", _svg(figures.similarity(measured), "similarity of layers")),
        ]
    return [*sections, ("Captions", _search(store))]


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
        f"<p>Finds captions that contain all words.{escape(note)}</p>"
        '<input id="words" type="search" placeholder="search" aria-label="search captions">'
        ' <span id="count"></span>'
        '<table id="found"></table>'
        f'<script id="captions" type="application/json">{data}</script><script>{_SCRIPT}</script>'
    )


def _images(store: LatentStore) -> list[tuple[str, str]]:
    """The first images of a latent store, if it is complete and its latents are pixels."""
    if store.manifest.identity.vae != "pixels" or not store.is_complete:
        return []
    codec = pixel_codec()
    images = [
        latents_to_images(store.read([sample]), codec.scale, codec.shift)[0]
        for sample in store.ids[:NUM_IMAGES]
    ]
    shown = "".join(f"<img class='sample' src='{_png(image)}' alt=''>" for image in images)
    return [("First images", shown)]


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _svg(figure: Figure, name: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img src='data:image/svg+xml;base64,{data}' alt='{escape(name)}'>"


def _page(report: Report, sections: Mapping[str, str]) -> str:
    title = escape(report.facts.title)
    body = "".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{body}</body></html>\n"
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
section > div > strong { display: none; }
table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; } tr { border-top: 1px solid #e4e7eb; }
img { max-width: 100%; } img.sample { width: 72px; margin: 2px; image-rendering: pixelated; }
#found td:not(:last-child) { white-space: nowrap; overflow-wrap: normal; }
input { font: inherit; padding: .3rem .5rem; width: 24rem; max-width: 100%; }
"""
_SCRIPT = """
const rows = JSON.parse(document.getElementById('captions').textContent);
const words = document.getElementById('words'), table = document.getElementById('found');
function show() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const found = rows.filter(r => wanted.every(w => r[2].toLowerCase().includes(w)));
  const some = found.slice(0, 50).map(r => [r[0], r[1], r[2] || '(the null caption)']);
  document.getElementById('count').textContent =
    found.length + ' captions' + (found.length > some.length ? ', the first 50:' : ':');
  table.replaceChildren();
  for (const row of [['id', 'tokens', 'caption'], ...some]) {
    const line = table.insertRow();
    for (const cell of row) line.insertCell().textContent = cell;
  }
}
words.addEventListener('input', show);
show();
"""
