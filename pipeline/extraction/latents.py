"""Images -> latent store: the plan, and the task that encodes one shard."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...schemas import (
    LATENT_SAMPLES_SCHEMA,
    Bucket,
    InputError,
    LatentIdentity,
    LatentManifest,
    Receipt,
)
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ..executor.base import Deferred, report_progress, worker_name
from ..executor.progress import Style, open_reporter
from ..executor.workers import inspect_workers, own_device
from ..models.vae import Autoencoder, find_vae, pixel_codec
from ..sources.images import (
    choose_buckets,
    describe_images,
    image_to_codes,
    images_fingerprint,
    nearest_bucket,
)
from ..sources.table import SampleTable, Unreadable, read_samples
from ..store.latents import LatentStore
from ..store.layout import pack
from .append import append, check_images, latent_generations
from .driver import check_space, exclusive_writer, provenance, run_shards

if TYPE_CHECKING:
    from ..models.hub import ModelFiles


LATENT_CHUNK_BYTES = 16_384
"""Latents are read one at a time; smaller chunks would only make the shard's index longer."""
PROGRESS = 64
"""Images after which the driver is told."""
BATCH_PIXELS = 2**20
"""Of the images that a VAE encodes at once: one of 1024 x 1024."""


def encode_images(
    source: str,
    latents: str | Path,
    *,
    vae: str = "pixels",
    image_column: str | None = None,
    text_column: str | None = None,
    size: int | None = None,
    buckets: int | None = None,
    limit: int | None = None,
    drop_broken: bool = False,
    shard_bytes: int = 256_000_000,
    workers: int | None = None,
    cluster: str = "local",
    force: bool = False,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
) -> LatentStore:
    """Encode the images of a table of samples into a latent store, of each row one.

    Called again with the same arguments it continues where it was stopped. Called with a source
    that gained rows at its end, it adds new shards to the store and leaves the old ones.

    Args:
        source: the same table that the features were made from, with an image column.
        latents: folder of the store, or the URL of one in an object store that fsspec knows.
        vae: ``pixels``: the image itself, scaled to [-1, 1]; or a VAE of diffusers, see
            :func:`semroute.pipeline.models.vae.find_vae`.
        text_column: of the captions, which join latents with features.
        size: height and width in pixels; shorter side resized, then centre crop. Default: all
            images have one size already.
        buckets: with ``size``, bring each image to the nearest of several shapes of about that area
            instead, whose sides are multiples of this many pixels; see
            :func:`semroute.pipeline.sources.images.choose_buckets`.
        drop_broken: complete the store although images are missing or cannot be read; training
            leaves their samples out.
        limit, shard_bytes, workers, cluster, force, report, progress: as in :func:`extract`.

    Raises:
        InputError: as in :func:`extract`; or images could not be read, after all others were
            encoded.
        ExtractionError, Interrupted: as in :func:`extract`.
    """
    latents = locate(latents)
    if buckets is not None and size is None:
        raise InputError("--buckets are of about one area: name it with --size, such as 1024")
    shapes = [] if size is None or buckets is None else choose_buckets(size, buckets)
    gpus = 0 if vae == "pixels" else None
    with exclusive_writer(latents, cluster, workers, report, gpus=gpus) as executor:
        begun = LatentStore.begun(latents)
        samples = read_samples(
            source, text_column=text_column, image_column=image_column, limit=limit, need="image"
        )
        images = describe_images(samples.image_files(), samples.source, size)
        if images.broken:
            report(f"{len(images.broken):,} of {len(samples):,} images cannot be read, as it seems")
        located = None if vae == "pixels" else find_vae(vae)
        there = inspect_workers(executor, str(latents), report)
        threads = 1 if located is None else there.threads
        if begun is not None:
            threads = begun.manifest.layout.num_threads
        digests = images.digests if begun is None else _since_begun(begun, images.digests)
        counts = []
        if begun is not None:
            check_images(begun, digests, samples.source)
            counts = [each.samples.num_samples for each in begun.manifest.generations]
        earlier = [count for count in counts if count < len(samples)]
        identity = _identity(located, images.size, shapes, samples, digests)
        bucket = np.zeros(len(samples), np.int32)
        if shapes:
            bucket = nearest_bucket(images.sizes, shapes)
            if begun is not None and begun.manifest.identity.buckets == identity.buckets:
                bucket[: len(begun)] = begun.buckets  # of images that were mended since, too
        # Entry k of the packing is sample order[k]: generation by generation, bucket by bucket.
        generation = np.searchsorted(earlier, np.arange(len(samples)), side="right")
        order = np.lexsort((bucket, generation))
        breaks = np.flatnonzero(np.diff(bucket[order])) + 1
        values = [np.prod(each.shape) for each in identity.buckets] or [np.prod(identity.shape)]
        latent_bytes = int(max(values)) * np.dtype(identity.dtype).itemsize
        num_bytes = latent_bytes * (1 + identity.deviation)
        packing = pack(
            np.ones(len(samples), np.int64),
            bytes_per_row=num_bytes,
            shard_bytes=shard_bytes,
            batch_tokens=1
            if located is None
            else max(1, BATCH_PIXELS // int(np.prod(images.size))),
            rows_per_chunk=max(1, LATENT_CHUNK_BYTES // latent_bytes),
            num_threads=threads,
            earlier=earlier,
            breaks=breaks.tolist(),
        )
        manifest = LatentManifest(
            status="extracting",
            identity=identity,
            layout=packing.layout,
            provenance=provenance(source, vae if located is None else located.name),
            grown_from=latent_generations(samples, digests, packing, begun),
        )
        rows = np.empty(len(samples), np.int64)
        rows[order] = packing.row_start
        columns = [range(len(samples)), samples.image_names(), digests, rows, bucket]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, LATENT_SAMPLES_SCHEMA, strict=True)]
        table = pa.table(arrays, schema=LATENT_SAMPLES_SCHEMA)
        if begun is not None and len(manifest.grown_from) > len(begun.manifest.grown_from):
            begun.check_same(manifest.before_growth())
            check_space(latents, (len(samples) - len(begun)) * num_bytes, force)
            store = append(begun, manifest, {"samples": table}, report)
        elif begun is not None:
            store = begun
            store.check_same(manifest)
        else:
            check_space(latents, len(samples) * num_bytes, force)
            store = LatentStore.create(latents, manifest, table)
        store.drop_broken = drop_broken
        remaining = store.remaining()
        executor.limit(len(remaining))

        def arguments(shard: int) -> tuple[_Task]:
            entries = packing.entries(shard)
            ids = order[entries.start : entries.stop]
            number = int(bucket[ids[0]])
            image = shapes[number] if shapes else images.size
            files = [*samples.take(ids).image_files()]
            return (_Task(latents.resolve(), located, shard, ids.tolist(), files, image, number),)

        shape = " x ".join(map(str, identity.shape))
        if shapes:
            shape = f"in {len(np.unique(bucket))} of {len(shapes)} buckets"
        report(
            f"{len(samples):,} images as {identity.vae}, {shape}: "
            f"{format_bytes(len(samples) * num_bytes)}; shards: {packing.layout.num_shards}, "
            f"to do: {len(remaining)}, {executor}"
        )
        run_shards(
            store,
            remaining,
            _encode_images,
            arguments,
            packing,
            executor=executor,
            report=report,
            listener=open_reporter(progress, "images"),
        )
        if dropped := len(store.manifest.identity.dropped):
            report(
                f"warning: {dropped:,} of {len(samples):,} samples are dropped, for their images "
                f"cannot be read; they are listed in {store.path / 'quarantine'}"
            )
    return store


def _identity(
    located: "ModelFiles | None",
    size: tuple[int, int],
    shapes: list[tuple[int, int]],
    samples: SampleTable,
    digests: list[str | None],
) -> LatentIdentity:
    """What the stored numbers depend on, known before any image is encoded."""
    common: dict[str, Any] = {
        "images": images_fingerprint(digests),
        "samples": samples.identity(),
    }
    if located is None:
        codec = pixel_codec()
        return LatentIdentity(
            vae="pixels",
            shape=(3, *size),
            buckets=[Bucket(height=h, width=w, shape=(3, h, w)) for h, w in shapes],
            dtype="uint8",
            scale=codec.scale,
            shift=codec.shift,
            **common,
        )
    encoder = Autoencoder(located)
    return LatentIdentity.model_validate(
        common
        | {
            "vae": encoder.name,
            "files": located.files,
            "shape": encoder.latent_shape(*size),
            "buckets": [
                {"height": h, "width": w, "shape": encoder.latent_shape(h, w)} for h, w in shapes
            ],
            "dtype": "float16",
            "scale": encoder.scale,
            "shift": encoder.shift,
            "deviation": encoder.has_deviation,
        }
    )


def _since_begun(store: LatentStore, digests: list[str | None]) -> list[str | None]:
    """Digests of images, but for those that could not be read: they may be mended meanwhile, and
    count as they were when the store was begun."""
    before, broken = store.samples["sha256"].to_pylist(), store.broken()
    pairs = enumerate(zip(before, digests, strict=False))
    old = [stored if stored is None or row in broken else now for row, (stored, now) in pairs]
    return old + digests[len(old) :]


@dataclass(frozen=True)
class _Task:
    """What a worker needs to write one shard.

    Attributes:
        vae: None where latents are pixels.
        ids: sample_id of each file.
        size: height and width of images.
        bucket: that they are of; 0 where there are none.
    """

    store: Path
    vae: "ModelFiles | None"
    shard: int
    ids: list[int]
    files: list[bytes | Unreadable]
    size: tuple[int, int]
    bucket: int


def _encode_images(task: _Task) -> Deferred[Receipt]:
    """Encode one shard of images, then write it and its receipt. Runs in a worker."""
    started = time.perf_counter()
    store = LatentStore.open(task.store, complete=False)
    layout, identity = store.manifest.layout, store.manifest.identity
    vae = None
    if task.vae is not None:
        import torch

        torch.set_num_threads(layout.num_threads)
        vae = _load_vae(task.vae, own_device())
    loaded = time.perf_counter()
    shape = (layout.rows_per_shard, *store.shape(task.bucket))
    planes = [np.zeros(shape, identity.dtype) for _ in store.names(task.bucket)]
    broken: dict[int, str] = {}
    told = 0
    for first in range(0, len(task.files), layout.batch_tokens):
        files = task.files[first : first + layout.batch_tokens]
        # A broken image leaves its place in the batch empty: the others' bits do not depend on it.
        pixels = np.zeros((len(files), 3, *task.size), np.uint8)
        good = []
        for row, file in enumerate(files):
            image = image_to_codes(file, task.size)
            if isinstance(image, Unreadable):
                broken[task.ids[first + row]] = image.reason
            else:
                pixels[row] = image
                good.append(row)
        if not good:
            continue
        for plane, codes in zip(planes, _codes(vae, pixels), strict=True):
            plane[[first + row for row in good]] = _stored(codes[good], identity.dtype)
        if first + len(files) - told >= PROGRESS:
            told = first + len(files)
            report_progress(task.shard, told)
    receipt = Receipt(
        shard=task.shard,
        num_rows=len(task.files),
        num_entries=len(task.files),
        files={},
        codec_error={},
        broken=broken,
        warnings=[],
        seconds={"load": loaded - started, "encode": time.perf_counter() - loaded},
        worker=worker_name(),
    )

    def write() -> Receipt:
        named = dict(zip(store.names(task.bucket), planes, strict=True))
        written = store.complete_shard(named, receipt)
        if broken:
            store.quarantine_images(task.shard, broken)
        return written

    return Deferred(write)


def _codes(vae: Autoencoder | None, pixels: np.ndarray) -> list[np.ndarray]:
    """What is stored of images ``[n, 3, H, W]``: mean, and deviation where there is one."""
    if vae is None:
        return [pixels]
    return [codes for codes in vae.encode(pixels) if codes is not None]


def _stored(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Codes in the type that is stored, all of them finite."""
    with np.errstate(over="ignore"):
        stored = codes.astype(dtype)
    if not np.isfinite(stored).all():
        raise InputError(
            f"the VAE gave numbers up to {np.abs(codes).max():g}, which {dtype} does not hold"
        )
    return stored


@lru_cache(maxsize=1)
def _load_vae(source: "ModelFiles", device: str) -> Autoencoder:
    """The VAE, loaded once a worker."""
    return Autoencoder(source, device)
