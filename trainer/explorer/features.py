"""What the explorer asks of a feature store.

Shapes: T tokens of a caption, L stored layers, H width, S captions of a sample.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from ...pipeline.inspection.statistics import (
    layer_norm,
    layer_of,
    measure_caption,
    measure_layers,
    normed_layers,
)
from ...pipeline.store.features import NULL_CAPTION, Caption, FeatureStore
from ...schemas import InputError
from ...schemas.escaping import one_line

NUM_SAMPLE = 1_000
"""Captions among which the nearest ones are found."""
NUM_FOUND = 100
"""Captions that a search lists."""
NUM_NEAREST = 12
SHORT, LONG = 200, 4_000
"""Characters of a caption in a list, and above its tokens."""
BATCH = 50
"""Captions of the sample that are read at once."""
Pool = Literal["mean", "last"]


class FeaturesView:
    """A feature store as the explorer shows it. Answers are dictionaries of plain values and
    arrays; every text in them is in one line, without control characters.

    Args:
        tokenizer: folder, GGUF file or Hub id of the store's LLM, whose tokenizer gives tokens
            their text. Default: where it is on this machine already; else tokens are numbered.
        sample: number of captions among which the nearest ones are found.

    Raises:
        InputError: no such tokenizer, or another one than that of the store.
    """

    def __init__(
        self, store: FeatureStore, *, tokenizer: str | None = None, sample: int = NUM_SAMPLE
    ) -> None:
        self.store = store
        self._tokenizer = _open_tokenizer(store, tokenizer)
        self._num_sample = sample
        self._latest: Caption | None = None

    def facts(self) -> dict[str, Any]:
        """Title and properties, and the names of layers."""
        summary = self.store.summary()
        return {
            "title": one_line(str(self.store.path)),
            "facts": [[one_line(name), one_line(value)] for name, value in summary.items.items()],
            "layers": self.store.layers,
            "layer": "LLM layer" if self.store.mixes is None else "mix",
            "captions": len(self.store),
            "named": self._tokenizer is not None,
        }

    def search(self, words: str) -> dict[str, Any]:
        """Captions that contain all words: their number, and the first 100."""
        found = self.store.search(words) if words.strip() else self.store.captions
        return {"count": found.num_rows, "captions": _listed(found.slice(0, NUM_FOUND))}

    def find(self, text: str) -> dict[str, Any]:
        """Number of the caption with this text; None if it is not in the store."""
        index = pc.index(self.store.captions["text"], text).as_py()
        return {"caption": None if index < 0 else index}

    def caption(self, caption: int) -> dict[str, Any]:
        """Texts of tokens, and float32 ``[T, L]`` of each measure.

        Raises:
            InputError: its shard is not written.
        """
        chosen = self.read(caption)
        measured = measure_caption(chosen.hidden)
        return {
            "caption": caption,
            "exact": chosen.text,
            "text": _shown(caption, chosen.text, LONG),
            "tokens": self._name_tokens(chosen.tokens, len(chosen.hidden)),
            "norm": measured.norm,
            "change": measured.change,
            "similarity": measured.similarity,
        }

    def nearest(self, caption: int, layer: int, pool: Pool) -> dict[str, Any]:
        """Captions of a sample whose LN(h) is most similar in a layer, pooled over tokens.

        Similarity is the cosine after the mean of the sample is subtracted: without that, what all
        captions share makes all of them similar. The sample is read once.

        Args:
            layer: number of a stored layer.
            pool: mean of all tokens, or the last token.

        Raises:
            InputError: no such layer, or the shard of the caption is not written.
        """
        (position,) = self.store.layer_positions([layer])
        ids, pooled = self._sample
        own = _pool(normed_layers(self.read(caption).hidden))[pool][position]
        vectors = pooled[pool][:, position].astype(np.float32)  # [S, H]
        centre = vectors.mean(0)
        vectors -= centre
        own = own - centre
        lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(own)
        cosine = vectors @ own / np.maximum(lengths, 1e-12)
        cosine[ids == caption] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:NUM_NEAREST]
        order = order[np.isfinite(cosine[order])]
        rows = _listed(self.store.captions.take(ids[order]))
        return {
            "captions": [
                [*row, round(float(value), 3)]
                for row, value in zip(rows, cosine[order], strict=True)
            ],
            "sample": len(ids),
        }

    def similarity(self) -> dict[str, Any]:
        """Linear CKA and cosine between layers, ``[L, L]``; see :func:`semroute.measure_layers`.

        Raises:
            InputError: shards of the sample are not written.
        """
        measured = self._measured
        return {"cka": measured.cka, "cosine": measured.cosine, "tokens": measured.num_rows}

    def read(self, caption: int) -> Caption:
        """A caption with its hidden states; the latest one is kept.

        Raises:
            InputError: no such caption, or its shard is not written.
        """
        if not 0 <= caption < len(self.store):
            raise InputError(f"no caption {caption}; the store has 0 to {len(self.store) - 1}")
        if self._latest is None or self._latest.caption_id != caption:
            self._latest = self.store[caption]
        return self._latest

    @cached_property
    def _measured(self) -> Any:
        return measure_layers(self.store)

    @cached_property
    def _sample(self) -> tuple[np.ndarray, dict[Pool, np.ndarray]]:
        """Ids of the first written captions in store order, which is random, int64 [S]; and their
        LN(h) by pool, float16 [S, L, H]."""
        written = ~np.isin(self.store.shards(), [*self.store.remaining()])
        written[NULL_CAPTION] = False
        ids = np.flatnonzero(written)[: self._num_sample]
        shape = (len(ids), len(self.store.layers), self.store.manifest.identity.model.width)
        pooled: dict[Pool, np.ndarray] = {
            "mean": np.empty(shape, np.float16),
            "last": np.empty(shape, np.float16),
        }
        for start in range(0, len(ids), BATCH):
            part = slice(start, min(start + BATCH, len(ids)))
            rows = self.store.read(ids[part])
            for position in range(shape[1]):
                normed = layer_norm(layer_of(rows, position))
                ends = rows.offsets[1:]
                counts = np.diff(rows.offsets)[:, None]
                pooled["mean"][part, position] = np.add.reduceat(normed, rows.offsets[:-1]) / counts
                pooled["last"][part, position] = normed[ends - 1]
        return ids, pooled

    def _name_tokens(self, tokens: list[int], num: int) -> list[str]:
        """A name for each of as many rows."""
        if self._tokenizer is None or len(tokens) != num:
            return [f"token {number}" for number in range(1, num + 1)]
        return [one_line(self._tokenizer.decode([token])) for token in tokens]


def _open_tokenizer(store: FeatureStore, name: str | None) -> Any:
    """The tokenizer of the store's LLM; None if none is named, and it is not on this machine."""
    place = _find_here(store.manifest.provenance.model) if name is None else name
    if place is None:
        return None
    try:
        from ...pipeline.models.hub import find_model
        from ...pipeline.models.llm import load_tokenizer, tokenizer_digest

        tokenizer = load_tokenizer(find_model(place, "tokenizer", weights=False))
    except (InputError, ImportError):
        if name is None:
            return None
        raise
    if tokenizer_digest(tokenizer) == store.manifest.identity.tokenizer:
        return tokenizer
    if name is None:
        return None
    raise InputError(
        f"tokenizer {name} is not that of {store.path}, whose captions were read by "
        f"{store.manifest.provenance.model}: name that LLM, or leave tokenizer out"
    )


def _find_here(model: str) -> str | None:
    """A model's folder or file on this machine; nothing is downloaded."""
    if Path(model).exists():
        return model
    from ...pipeline.models.hub import is_hub_id

    name, _, revision = model.partition("@")
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return str(Path(file).parent) if isinstance(file, str) else None


def _pool(normed: np.ndarray) -> dict[str, np.ndarray]:
    """[T, L, H] -> [L, H] by pool."""
    return {"mean": normed.mean(0), "last": normed[-1]}


def _listed(captions: Any) -> list[list[Any]]:
    """Id, tokens and text of each of some rows of the table of captions."""
    columns = [captions[name].to_pylist() for name in ("caption_id", "num_tokens", "text")]
    return [
        [caption, num_tokens, _shown(caption, text, SHORT)]
        for caption, num_tokens, text in zip(*columns, strict=True)
    ]


def _shown(caption: int, text: str, most: int) -> str:
    if caption == NULL_CAPTION:
        return "(the null caption)"
    return one_line(text if len(text) <= most else f"{text[: most - 1]}…")
