"""The contents of a store, for people and for machines."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...schemas import Receipt, Report, Summary
from ...schemas.columns import numbers
from ...schemas.units import format_bytes
from ..codecs.error import codec_error, layer_error
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.open import open_store

NUM_SHOWN = 5
"""Quarantined shards that are listed."""


def inspect(path: str | os.PathLike[str]) -> Report:
    """Describe a store, finished or not.

    Raises:
        StoreError: no store there.
    """
    store = open_store(path)
    layout, receipts = store.manifest.layout, list(store.receipts().values())
    items = dict(store.summary().items)
    details = {
        "path": str(store.path),
        "format": store.manifest.format,
        "status": store.manifest.status,
        "shards": layout.num_shards,
        "shards_written": layout.num_shards - len(store.remaining()),
        "bytes": store.num_bytes(),
    }
    if isinstance(store, FeatureStore):
        _describe_features(store, receipts, items, details)
    elif isinstance(store, LatentStore) and store.manifest.identity.buckets:
        details["buckets"] = store.bucket_counts()
    details["manifest"] = store.manifest.model_dump(mode="json", exclude_unset=True)
    warnings = sorted({warning for receipt in receipts for warning in receipt.warnings})
    quarantined = {shard: q.reason for shard, q in sorted(store.quarantined().items())}
    details |= {"warnings": warnings, "quarantined": quarantined}
    items |= {f"warning {number}": text for number, text in enumerate(warnings, 1)}
    if quarantined:
        items["quarantined"] = list_quarantined(quarantined)
    return Report(Summary(f"{type(store).__name__} {store.path}", items), details)


def list_quarantined(reasons: Mapping[int, str]) -> str:
    """The number of quarantined shards, and the reasons of the first ones."""
    shown = "; ".join(f"shard {shard}: {why}" for shard, why in [*reasons.items()][:NUM_SHOWN])
    return f"{len(reasons)} shards: {shown}"


def _describe_features(
    store: FeatureStore, receipts: list[Receipt], items: dict[str, str], details: dict[str, Any]
) -> None:
    """Add what is known of a feature store to ``items``, for people, and to ``details``."""
    lengths = numbers(store.captions["num_tokens"])
    cut = numbers(store.captions["num_cut_tokens"])
    error, by_layer = codec_error(receipts), layer_error(receipts)
    num_bytes = store.num_bytes()  # 0 if the receipts are lost
    items["tokens"] += f"; {lengths.mean():.1f} per caption on average, at most {lengths.max()}"
    items["bytes per token"] = format_bytes(store.bytes_per_row())
    if error:
        what = "LN(h)" if store.mixes is None else "what blocks read"
        items["codec error"] = (
            f"{what} {error['mean']:.1e} mean, {error['max']:.1e} max; without the three largest "
            f"channels {error['mean_without_top3']:.1e}, {error['max_without_top3']:.1e}"
        )
    if by_layer and max(by_layer.values()) > 0:
        worst = max(by_layer, key=by_layer.__getitem__)
        worst_error = f"worst in layer {worst}, {by_layer[worst]:.1e}"
        items["codec error"] = "; ".join(filter(None, [items.get("codec error"), worst_error]))
    details |= {
        "model": store.manifest.provenance.model,
        "template": store.manifest.identity.template.text,
        "layers": store.manifest.identity.llm_layers,
        "mixes": None if store.mixes is None else store.mixes.num_mixes,
        "captions": len(store),
        "samples": store.manifest.identity.samples.num_samples,
        "tokens": store.manifest.layout.num_rows,
        "tokens_longest": int(lengths.max()),
        "captions_cut": int(np.count_nonzero(cut)),
        "bytes_per_token": store.bytes_per_row(),
        "bytes_padded_bf16": store.padded_bytes(),
        "ratio_to_padded_bf16": (
            store.padded_bytes() / num_bytes if store.is_complete and num_bytes else None
        ),
        "codec": store.manifest.codec.name,
        "exact_layers": [*store.manifest.codec.exact_layers],
        "codec_error": error,
        "layer_error": by_layer,
    }
