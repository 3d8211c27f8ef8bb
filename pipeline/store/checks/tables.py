"""Tables of a store, against its manifest: rows, shards and ids."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ....schemas import Bucket, ConditioningIdentity, FeatureIdentity, Layout, fingerprint
from ....schemas.columns import numbers

_MAX_ROWS = 2**62
"""Rows of all shards: numbers of rows and their sums fit into 64 bits."""


def layout_faults(layout: Layout) -> Iterator[str]:
    """What of a layout cannot be."""
    if layout.rows_per_shard % layout.rows_per_chunk:
        yield (
            f"layout: shards of {layout.rows_per_shard:,} rows are no whole chunks of "
            f"{layout.rows_per_chunk:,}"
        )
    rows = layout.num_shards * layout.rows_per_shard
    if rows > _MAX_ROWS or layout.num_rows > rows:
        yield f"layout: {layout.num_rows:,} rows in use of {rows:,} in all shards"


def caption_faults(captions: pa.Table, layout: Layout, num_rows: np.ndarray) -> Iterator[str]:
    """What of the captions' places cannot be.

    Args:
        captions: with the columns caption_id, shard, row_start and row_stop.
        num_rows: of each caption as its tokens say, int64 ``[captions]``.
    """
    starts, stops, shards = (numbers(captions[name]) for name in ("row_start", "row_stop", "shard"))
    if not np.array_equal(numbers(captions["caption_id"]), np.arange(len(captions))):
        yield "caption_id is not 0, 1, 2 and so on"
    yield from _shard_faults(shards, layout)
    rows = layout.num_shards * layout.rows_per_shard
    for caption in _first((starts < 0) | (stops < starts) | (stops > rows)):
        yield (
            f"caption {caption} has rows {starts[caption]:,} to {stops[caption]:,}; expected a "
            f"range in 0 to {rows:,}"
        )
        return  # what follows would overflow
    firsts = shards.astype(np.int64) * layout.rows_per_shard
    for caption in _first((starts < firsts) | (stops > firsts + layout.rows_per_shard)):
        yield f"caption {caption} is not within shard {shards[caption]}, which it names"
    for caption in _first(starts[1:] < stops[:-1]):
        yield f"rows of captions {caption} and {caption + 1} overlap"
    for caption in _first(stops - starts != num_rows):
        yield (
            f"caption {caption} has {stops[caption] - starts[caption]:,} rows for "
            f"{num_rows[caption]:,} tokens"
        )
    total = int((stops - starts).sum())
    if total != layout.num_rows:
        yield f"captions have {total:,} rows; the manifest says {layout.num_rows:,}"


def token_faults(captions: pa.Table) -> Iterator[str]:
    """What of the numbers of tokens cannot be, in a table that has them."""
    if "num_tokens" not in captions.column_names:
        return
    num, cut = (numbers(captions[name]) for name in ("num_tokens", "num_cut_tokens"))
    listed = numbers(pc.list_value_length(captions["token_ids"]))
    for caption in _first(num != listed):
        yield f"caption {caption} has {num[caption]} tokens, but lists {listed[caption]}"
    if (cut < 0).any():
        yield "num_cut_tokens is negative"


def sample_faults(samples: pa.Table, num_captions: int) -> Iterator[str]:
    """What of the samples' captions cannot be."""
    yield from _id_faults(samples)
    lists = samples["caption_ids"]
    for sample in _first(numbers(pc.list_value_length(lists)) < 1):
        yield f"sample {sample} has no caption"
    ids = numbers(pc.list_flatten(lists))
    if len(ids) and not (ids.min() >= 0 and ids.max() < num_captions):
        yield f"names captions {ids.min()} to {ids.max()}; the store has 0 to {num_captions - 1}"
    if "source_row" in samples.column_names:
        rows = numbers(samples["source_row"])
        if (rows[:1] < 0).any() or (np.diff(rows) <= 0).any():
            yield "source_row does not ascend from 0 on"
    if "caption_weights" in samples.column_names:
        weights = samples["caption_weights"]
        own, listed = (numbers(pc.list_value_length(each)) for each in (weights, lists))
        if not np.array_equal(own, listed):
            yield "a sample has not as many caption_weights as captions"
        flat = numbers(pc.list_flatten(weights))
        if not (np.isfinite(flat) & (flat > 0)).all():
            yield "caption_weights are not all numbers above 0"


def text_faults(
    captions: pa.Table, samples: pa.Table, identity: FeatureIdentity | ConditioningIdentity
) -> Iterator[str]:
    """What the texts are not that the manifest has the fingerprints of; takes longer than the
    rest."""
    texts = captions["text"].cast(pa.large_string()).combine_chunks()
    if fingerprint(texts) != identity.captions.fingerprint:
        yield "captions.parquet: its texts are not those of the manifest's fingerprint"
    lists = samples["caption_ids"].combine_chunks()
    joined = pa.ListArray.from_arrays(lists.offsets, texts.take(lists.values))
    if identity.samples.fingerprint not in (None, fingerprint(joined)):
        yield "samples.parquet: captions of samples are not those of the manifest's fingerprint"


def latent_faults(samples: pa.Table, layout: Layout, buckets: list[Bucket]) -> Iterator[str]:
    """What of the samples' places cannot be."""
    yield from _id_faults(samples)
    rows, bucket = numbers(samples["row"]), numbers(samples["bucket"])
    total = layout.num_shards * layout.rows_per_shard
    for sample in _first((rows < 0) | (rows >= total)):
        yield f"sample {sample} has row {rows[sample]:,}; expected 0 to {total - 1:,}"
        return
    for sample in _first((bucket < 0) | (bucket >= max(1, len(buckets)))):
        yield f"sample {sample} is in bucket {bucket[sample]}; there are {len(buckets)}"
        return
    order = np.argsort(rows, kind="stable")
    for place in _first(np.diff(rows[order]) == 0):
        yield f"samples {order[place]} and {order[place + 1]} have the same row"
    shards = rows[order] // layout.rows_per_shard
    yield from _shard_faults(shards, layout)
    same = np.diff(shards) == 0
    for place in _first(same & (np.diff(bucket[order]) != 0)):
        yield f"shard {shards[place]} has samples of several buckets"
    if len(rows) != layout.num_rows:
        yield f"has {len(rows):,} samples; the manifest says {layout.num_rows:,} rows"


def _id_faults(samples: pa.Table) -> Iterator[str]:
    if not np.array_equal(numbers(samples["sample_id"]), np.arange(len(samples))):
        yield "sample_id is not 0, 1, 2 and so on"


def _shard_faults(shards: np.ndarray, layout: Layout) -> Iterator[str]:
    """Shards follow one another, and none is empty: so their number is that of the layout."""
    wrong = ~np.isin(np.diff(shards.astype(np.int64), prepend=0), (0, 1))
    wrong[:1] = shards[:1] != 0
    for entry in _first(wrong):
        yield f"entry {entry} is in shard {shards[entry]}; expected shards in order, none empty"
        return
    if int(shards[-1]) + 1 != layout.num_shards:
        yield f"has {int(shards[-1]) + 1:,} shards; the manifest says {layout.num_shards:,}"


def _first(wrong: np.ndarray) -> list[int]:
    """Index of the first true value, if there is one."""
    return np.flatnonzero(wrong)[:1].tolist() if wrong.any() else []
