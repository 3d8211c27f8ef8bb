"""Images -> latent store: the plan, and the task that encodes one shard."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ..schemas import LATENT_SAMPLES_SCHEMA, LatentIdentity, LatentManifest, Receipt
from .filling import check_space, fill, name_workers, num_workers, provenance
from .latents import describe_images, image_to_codes, pixel_codec
from .layout import format_bytes, pack
from .samples import read_samples
from .store import LatentStore

LATENT_CHUNK_BYTES = 16_384
"""Latents are read one at a time; smaller chunks would only make the shard's index longer."""


def encode_images(
    source: str,
    latents: str | Path,
    *,
    vae: Literal["pixels"] = "pixels",
    image_column: str | None = None,
    text_column: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    shard_bytes: int = 256_000_000,
    workers: int | None = None,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> LatentStore:
    """Encode the images of a table of samples into a latent store; latent i belongs to row i.

    Called again with the same arguments it continues where it was stopped.

    Args:
        source: the same table that the features were made from, with an image column.
        latents: folder of the store.
        vae: ``pixels``: the image itself, scaled to [-1, 1].
        text_column: of the captions, which join latents with features.
        size: height and width in pixels; shorter side resized, then centre crop. Default: all
            images have one size already.
        limit, shard_bytes, workers, force, report: as in :func:`extract`.

    Raises:
        InputError, ExtractionError, Interrupted: as in :func:`extract`.
    """
    latents = Path(latents)
    samples = read_samples(
        source, text_column=text_column, image_column=image_column, limit=limit, need="image"
    )
    images = describe_images(samples.image_files(), samples.source, size)
    codec = pixel_codec()
    num_bytes = int(np.prod(images.shape))
    packing = pack(
        np.ones(len(samples), np.int64),
        bytes_per_row=num_bytes,
        shard_bytes=shard_bytes,
        batch_tokens=1,
        rows_per_chunk=max(1, LATENT_CHUNK_BYTES // num_bytes),
    )
    manifest = LatentManifest(
        status="extracting",
        identity=LatentIdentity(
            vae=vae,
            shape=images.shape,
            dtype="uint8",
            scale=codec.scale,
            shift=codec.shift,
            images=images.fingerprint,
            samples=samples.identity(),
        ),
        layout=packing.layout,
        provenance=provenance(source, vae),
    )
    begun = LatentStore.begun(latents)
    if begun is not None:
        store = begun
        store.check_same(manifest)
    else:
        check_space(latents, len(samples) * num_bytes, force)
        columns = [range(len(samples)), samples.image_names(), images.digests]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, LATENT_SAMPLES_SCHEMA, strict=True)]
        table = pa.table(arrays, schema=LATENT_SAMPLES_SCHEMA)
        store = LatentStore.create(latents, manifest, table)
    remaining = store.remaining()
    workers = min(num_workers(workers, gpus=0), len(remaining))

    def arguments(shard: int) -> tuple[Path, int, list[bytes], tuple[int, int, int]]:
        entries = packing.entries(shard)
        chosen = list(samples.slice(entries.start, entries.stop).image_files())
        return latents.resolve(), shard, chosen, images.shape

    report(
        f"{len(samples):,} images of {' x '.join(map(str, images.shape))}: "
        f"{format_bytes(len(samples) * num_bytes)}; shards: {packing.layout.num_shards}, "
        f"to do: {len(remaining)}, {name_workers(workers)}"
    )
    fill(
        store,
        remaining,
        _encode_images,
        arguments,
        packing,
        workers=workers,
        unit="images",
        report=report,
    )
    return store


def _encode_images(
    path: Path, shard: int, files: list[bytes], shape: tuple[int, int, int]
) -> Receipt:
    """Decode and write one shard of images, then its receipt. Runs in a worker."""
    started = time.perf_counter()
    store = LatentStore.open(path, complete=False)
    codes = np.zeros((store.manifest.layout.rows_per_shard, *shape), np.uint8)
    for row, file in enumerate(files):
        codes[row] = image_to_codes(file, shape[1:])
    encoded = time.perf_counter()
    written = store.write_shard(shard, codes)
    receipt = Receipt(
        shard=shard,
        num_rows=len(files),
        num_entries=len(files),
        files=written,
        codec_error={},
        warnings=[],
        seconds={"encode": encoded - started, "write": time.perf_counter() - encoded},
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )
    store.write_receipt(receipt)
    return receipt
