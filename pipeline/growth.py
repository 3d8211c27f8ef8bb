"""A feature store that gains samples: new captions in new shards, all else as it is."""

import json
from collections.abc import Callable

import pyarrow as pa

from ..schemas import FeatureManifest, Generation
from .layout import Packing
from .ledger import StoreError, render_table, settle, stage
from .planning import Plan
from .store import FeatureStore


def check_rows(store: FeatureStore, plan: Plan) -> None:
    """Refuse a file that does not begin with the rows that a store was made from.

    Raises:
        StoreError: with the first row that differs; or the file ends before the store does.
    """
    expected = store.manifest.identity.samples
    if expected in (*plan.earlier, plan.identity.samples):
        return
    ids = store.samples["caption_ids"].combine_chunks()
    texts = store.captions["text"].take(ids.flatten()).combine_chunks()
    before = pa.ListArray.from_arrays(ids.offsets, texts).to_pylist()
    now = plan.samples.texts().to_pylist()
    source = plan.samples.source
    for row, (found, stored) in enumerate(zip(now, before, strict=False)):
        if found != stored:
            raise StoreError(
                f"{source}: row {row}, counted from 0, is {_shown(found)}, but {store.path} was "
                f"made from {_shown(stored)} there. A store grows where rows are added at the end "
                "of its file; where others changed, name a new folder."
            )
    raise StoreError(
        f"{source}: {len(now):,} rows were asked for, but {store.path} holds "
        f"{len(before):,} samples, which begin with these. Name the file that it was made from "
        "last, or a new folder."
    )


def generations(plan: Plan, packing: Packing, begun: FeatureStore | None) -> list[Generation]:
    """What a store was each time before it grew, as the plan has it."""
    made = [] if begun is None else [g.provenance for g in begun.manifest.generations]
    pairs = zip(plan.captions.earlier, plan.earlier, strict=True)
    return [
        Generation(
            captions=captions,
            samples=samples,
            num_shards=int(packing.shard[captions.num_captions - 1]) + 1,
            num_rows=int(plan.captions.num_tokens[: captions.num_captions].sum()),
            provenance=made[number],
        )
        for number, (captions, samples) in enumerate(pairs)
    ]


def grow(
    store: FeatureStore,
    manifest: FeatureManifest,
    samples: pa.Table,
    captions: pa.Table,
    report: Callable[[str], None],
) -> FeatureStore:
    """Make room for the captions that a store does not have; no shard is written.

    Tables, shapes, checksums and manifest are written beside and put in place together: what
    is stopped on the way is still the store that it was, or is finished by the same command.

    Args:
        store: as it is.
        manifest: as it will be.
        samples, captions: all rows of the tables, those of the store first.
        report: takes one line of text at a time.
    """
    before, layout = store.manifest.layout, manifest.layout
    report(
        f"{store.path} grows from {store.samples.num_rows:,} samples to {samples.num_rows:,}: "
        f"{captions.num_rows - len(store):,} new captions in "
        f"{layout.num_shards - before.num_shards} new shards"
    )
    pairs = {
        "captions.parquet": (store.captions, captions),
        "samples.parquet": (store.samples, samples),
    }
    files = {
        name: render_table(pa.concat_tables([stored, table.slice(len(stored))]))
        for name, (stored, table) in pairs.items()
    }
    for plane in store.arrays:
        name = f"{store.group}/{plane}/zarr.json"
        metadata = json.loads(store.read_file(name).to_pybytes())
        metadata["shape"][0] = layout.num_shards * layout.rows_per_shard
        files[name] = json.dumps(metadata, indent=2).encode()
    stage(store, manifest, files)
    settle(store.path)
    return FeatureStore.open(store.path, complete=False)


def added_bytes(store: FeatureStore, manifest: FeatureManifest) -> int:
    """Bytes that new shards will take, judged by those that are written."""
    rows = sum(receipt.num_rows for receipt in store.receipts().values())
    ratio = store.num_bytes() / rows if rows else store.bytes_per_row()
    return int(ratio * (manifest.layout.num_rows - store.manifest.layout.num_rows))


def _shown(texts: list[str]) -> str:
    text = repr(texts[0] if len(texts) == 1 else texts)
    return text if len(text) <= 70 else f"{text[:67]}..."
