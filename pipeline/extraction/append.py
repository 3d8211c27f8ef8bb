"""Stores that gain samples: new samples go into new shards, the others stay as they are."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from ...schemas import (
    AnyManifest,
    CaptionsIdentity,
    Checksums,
    FeatureManifest,
    Generation,
    LatentGeneration,
    LatentManifest,
    SamplesIdentity,
    digest,
    write_whole,
)
from ...schemas.files import inside
from ...schemas.json_file import load_json
from ..sources.images import images_fingerprint
from ..sources.table import SampleTable
from ..store.base import Store, check_unchanged
from ..store.captions import CaptionStore
from ..store.conditioning import ConditioningStore
from ..store.documents import (
    CHECKSUMS,
    GROWING,
    MANIFEST,
    StoreError,
    commit,
    render_table,
    write_contract,
)
from ..store.features import FeatureStore
from ..store.latents import LatentStore, array_shapes
from ..store.layout import Packing


def stage(store: Store[Any], manifest: AnyManifest, files: Mapping[str, bytes]) -> None:
    """Write what a store will be beside what it is; from the last rename on, it is decided.

    Args:
        manifest: of the store to be.
        files: all others that are not as they were, by path relative to the store.
    """
    commit(store.path)
    check_unchanged(store)
    staged = inside(store.path, GROWING)
    for name, content in files.items():
        write_whole(staged / name, content)
    if store.checksums is not None:
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        checksums = Checksums(manifest=digest(manifest), files=store.checksums.files | digests)
        write_contract(staged / CHECKSUMS, checksums)
    write_contract(staged / MANIFEST, manifest)


S = TypeVar("S", FeatureStore, LatentStore, ConditioningStore)


def check_rows(
    store: CaptionStore[Any], samples: SampleTable, earlier: Sequence[SamplesIdentity]
) -> None:
    """Refuse a file that does not begin with the rows that a store was made from.

    Args:
        samples: of the file.
        earlier: identities of its first samples, as many as the store had before it grew.

    Raises:
        StoreError: with the first row that differs; or the file ends before the store does.
    """
    expected = store.manifest.identity.samples
    if expected in (*earlier, samples.identity()):
        return
    ids = store.samples["caption_ids"].combine_chunks()
    texts = store.captions["text"].take(ids.flatten()).combine_chunks()
    before = pa.ListArray.from_arrays(ids.offsets, texts).to_pylist()
    now = samples.texts().to_pylist()
    source = samples.source
    for row, (found, stored) in enumerate(zip(now, before, strict=False)):
        if found != stored:
            raise StoreError(
                f"{source}: row {row}, counted from 0, is {_shown(found)}, but {store.path} was "
                f"made from {_shown(stored)} there. A store grows where rows are added at the end "
                "of its file; where others changed, name a new folder."
            )
    asked = samples.identity()
    if (asked.blank, asked.weights) != (expected.blank, expected.weights):
        raise StoreError(
            f"{store.path} was made with --blank {expected.blank or 'error'} and weights "
            f"{expected.weights}, now it is --blank {asked.blank or 'error'} and {asked.weights}. "
            "Run the command as it was, or name a new folder."
        )
    raise StoreError(
        f"{source}: {len(now):,} rows were asked for, but {store.path} holds "
        f"{len(before):,} samples, which begin with these. Name the file that it was made from "
        "last, or a new folder."
    )


def generations(
    identities: Sequence[CaptionsIdentity],
    earlier: Sequence[SamplesIdentity],
    packing: Packing,
    begun: CaptionStore[Any] | None,
) -> list[Generation]:
    """Generations of a store of captions before its latest growth, oldest first.

    Args:
        identities: of the captions of each of them, and earlier: of their samples.
    """
    made = [] if begun is None else [g.provenance for g in begun.manifest.generations]
    pairs = zip(identities, earlier, strict=True)
    return [
        Generation(
            captions=captions,
            samples=samples,
            num_shards=int(packing.shard[captions.num_captions - 1]) + 1,
            num_rows=int(packing.num_rows[: captions.num_captions].sum()),
            provenance=made[number],
        )
        for number, (captions, samples) in enumerate(pairs)
    ]


def check_images(store: LatentStore, digests: Sequence[str | None], source: str) -> None:
    """Refuse a file that does not begin with the images that a store was made from.

    Args:
        digests: sha256 of every image of the file, those that could not be read when the store
            was begun as they were then.

    Raises:
        StoreError: with the first row that differs; or the file ends before the store does.
    """
    before = store.samples["sha256"].to_pylist()
    for row, (found, stored) in enumerate(zip(digests, before, strict=False)):
        if found != stored:
            raise StoreError(
                f"{source}: the image of row {row}, counted from 0, is not the one that "
                f"{store.path} was made from (identity.images). A store grows where rows are added "
                "at the end of its file; where others changed, name a new folder."
            )
    if len(digests) < len(before):
        raise StoreError(
            f"{source}: {len(digests):,} rows were asked for, but {store.path} holds "
            f"{len(before):,} samples, which begin with these. Name the file that it was made from "
            "last, or a new folder."
        )


def latent_generations(
    samples: SampleTable,
    digests: Sequence[str | None],
    packing: Packing,
    begun: LatentStore | None,
) -> list[LatentGeneration]:
    """Generations of a latent store before it grew to these samples, oldest first."""
    made = [] if begun is None else begun.manifest.generations
    return [
        LatentGeneration(
            images=images_fingerprint(digests[:num]),
            samples=samples.slice(0, num).identity(),
            num_shards=int(packing.shard[num - 1]) + 1,
            num_rows=num,
            provenance=generation.provenance,
        )
        for generation in made
        if (num := generation.samples.num_samples) < len(digests)
    ]


def append(
    store: S,
    manifest: AnyManifest,
    tables: Mapping[str, pa.Table],
    report: Callable[[str], None],
) -> S:
    """Make room in a store for new samples; no shard is written.

    Tables, shapes, checksums and manifest are staged and put in place together: a store whose
    growth was interrupted is still the old one, or the same command completes it.

    Args:
        store: as it is.
        manifest: as it will be.
        tables: all rows of its tables, those of the store first, by name without ``.parquet``.
        report: takes one line of text at a time.
    """
    before, layout = store.manifest.layout, manifest.layout
    added = {name: table.num_rows - getattr(store, name).num_rows for name, table in tables.items()}
    captions = f" and {added['captions']:,} captions" if "captions" in added else ""
    report(
        f"{store.path} grows: {added['samples']:,} new samples{captions} in "
        f"{layout.num_shards - before.num_shards} new shards"
    )
    files = {}
    for name, table in tables.items():
        stored = getattr(store, name)
        for column in (c for c in table.column_names if c not in stored.column_names):
            first = table.slice(0, stored.num_rows)
            stored = stored.append_column(table.schema.field(column), first[column])
        whole = pa.concat_tables([stored, table.slice(stored.num_rows)])
        files[f"{name}.parquet"] = render_table(whole)
    names = array_shapes(manifest) if isinstance(manifest, LatentManifest) else store.arrays
    for array in names:
        name = f"{store.group}/{array}/zarr.json"
        metadata = load_json(store.read_file(name).to_pybytes(), str(store.path / name))
        metadata["shape"][0] = layout.num_shards * layout.rows_per_shard
        files[name] = json.dumps(metadata, indent=2).encode()
    stage(store, manifest, files)
    commit(store.path)
    return type(store).open(store.path, complete=False)


def added_bytes(store: FeatureStore, manifest: FeatureManifest) -> int:
    """Estimated bytes of the new shards, from those that are written."""
    rows = sum(receipt.num_rows for receipt in store.receipts().values())
    ratio = store.num_bytes() / rows if rows else store.bytes_per_row()
    return int(ratio * (manifest.layout.num_rows - store.manifest.layout.num_rows))


def _shown(texts: list[str]) -> str:
    text = repr(texts[0] if len(texts) == 1 else texts)
    return text if len(text) <= 70 else f"{text[:67]}..."
