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
    parse,
)
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ..executor.base import Deferred, report_progress, worker_name
from ..executor.progress import Style
from ..executor.workers import Workers, own_device
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
from .append import check_images, latent_generations
from .driver import StorePlan, provenance, write_store
from .requests import LatentsRequest

if TYPE_CHECKING:
    from ..models.hub import ModelFiles


LATENT_CHUNK_BYTES = 16_384
"""Latents are read one at a time; smaller chunks would only make the shard's index longer."""
PROGRESS = 64
"""Images between two progress reports."""
BATCH_PIXELS = 2**20
"""Pixels that a VAE encodes at once: one image of 1024 x 1024."""


def encode_images(
    source: str,
    latents: str | Path,
    *,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
    **options: Any,
) -> LatentStore:
    """Encode the images of a table of samples into a latent store, one per row.

    Called again with the same arguments it resumes where it was stopped. Called with a source that
    gained rows at its end, it adds new shards to the store and leaves the old ones.

    Args:
        source, latents, options: the fields of
            :class:`semroute.pipeline.extraction.requests.LatentsRequest`; ``latents`` is its
            target.
        report, progress: as in :func:`semroute.pipeline.extraction.extract`.

    Raises:
        InputError: as in :func:`extract`; or images could not be read, after all others were
            encoded.
        ExtractionError, Interrupted: as in :func:`extract`.
    """
    request = parse(
        LatentsRequest, {"source": source, "target": locate(latents), **options}, "the latents"
    )
    if request.buckets is not None and request.size is None:
        raise InputError("--buckets are of about one area: name it with --size, such as 1024")

    def plan(existing: LatentStore | None, workers: Workers) -> LatentPlan:
        return plan_latents(request, existing, workers, report)

    gpus = 0 if request.vae == "pixels" else None
    store = write_store(LatentStore, plan, request, report, progress, gpus=gpus)
    if dropped := len(store.manifest.identity.dropped):
        report(
            f"warning: {dropped:,} of {len(store):,} samples are dropped, for their images "
            f"cannot be read; they are listed in {store.path / 'quarantine'}"
        )
    return store


@dataclass(frozen=True, kw_only=True)
class LatentPlan(StorePlan[LatentStore]):
    """A latent store to be encoded.

    Attributes:
        request: what was asked for.
        samples: the user's table.
        digests: sha256 of each sample's image; None where it cannot be read.
        vae: None where latents are pixels.
        size: height and width of images that are in no bucket.
        shapes: height and width of images of each bucket; empty where there are none.
        bucket: bucket of each sample, int32 ``[samples]``.
        order: sample of each entry of the packing, int64 ``[samples]``: generation by generation,
            bucket by bucket.
        bytes_per_sample: largest number of bytes that a sample takes.
    """

    unit = "images"

    manifest: LatentManifest
    request: LatentsRequest
    samples: SampleTable
    digests: list[str | None]
    vae: "ModelFiles | None"
    size: tuple[int, int]
    shapes: list[tuple[int, int]]
    bucket: np.ndarray
    order: np.ndarray
    bytes_per_sample: int

    def tables(self) -> dict[str, pa.Table]:
        num = len(self.samples)
        rows = np.empty(num, np.int64)
        rows[self.order] = self.packing.row_start
        columns = [range(num), self.samples.image_names(), self.digests, rows, self.bucket]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, LATENT_SAMPLES_SCHEMA, strict=True)]
        return {"samples": pa.table(arrays, schema=LATENT_SAMPLES_SCHEMA)}

    def new_bytes(self) -> int:
        done = 0 if self.existing is None else len(self.existing)
        return (len(self.samples) - done) * self.bytes_per_sample

    def create(self) -> LatentStore:
        return LatentStore.create(self.path, self.manifest, self.tables()["samples"])

    def prepare(self, store: LatentStore) -> LatentStore:
        store.drop_broken = self.request.broken == "skip"
        return store

    def describe(self) -> str:
        identity = self.manifest.identity
        shape = " x ".join(map(str, identity.shape))
        if self.shapes:
            shape = f"in {len(np.unique(self.bucket))} of {len(self.shapes)} buckets"
        size = format_bytes(len(self.samples) * self.bytes_per_sample)
        return f"{len(self.samples):,} images as {identity.vae}, {shape}: {size}"

    def task(self, shard: int) -> "tuple[_Task]":
        entries = self.packing.entries(shard)
        ids = self.order[entries.start : entries.stop]
        number = int(self.bucket[ids[0]])
        image = self.shapes[number] if self.shapes else self.size
        files = [*self.samples.take(ids).image_files()]
        path = self.path.resolve()
        return (_Task(path, self.vae, shard, ids.tolist(), files, image, number),)

    @staticmethod
    def function(*task: Any) -> Deferred[Receipt]:
        return _encode_images(*task)


def plan_latents(
    request: LatentsRequest,
    existing: LatentStore | None,
    workers: Workers,
    report: Callable[[str], None],
) -> LatentPlan:
    """Plan a latent store: reads all images once, and asks no worker.

    Raises:
        InputError: bad input; or ``existing`` was not made from the first rows of the source.
    """
    size, source = request.size, request.source
    shapes = (
        [] if size is None or request.buckets is None else choose_buckets(size, request.buckets)
    )
    samples = read_samples(
        source,
        **request.text_options,
        image_folder=request.image_folder,
        image_column=request.image_column,
        limit=request.limit,
        need="image",
    )
    report(samples.describe())
    images = describe_images(samples.image_files(), samples.source, size)
    if images.broken:
        report(f"{len(images.broken):,} of {len(samples):,} images cannot be read, as it seems")
    vae = None if request.vae == "pixels" else find_vae(request.vae)
    threads = 1 if vae is None else workers.threads
    digests, earlier = images.digests, []
    if existing is not None:
        threads = existing.manifest.layout.num_threads
        digests = _since_begun(existing, images.digests)
        check_images(existing, digests, samples.source)
        counts = [each.samples.num_samples for each in existing.manifest.generations]
        earlier = [count for count in counts if count < len(samples)]
    identity = _identity(vae, images.size, shapes, samples, digests)
    bucket = np.zeros(len(samples), np.int32)
    if shapes:
        bucket = nearest_bucket(images.sizes, shapes)
        if existing is not None and existing.manifest.identity.buckets == identity.buckets:
            bucket[: len(existing)] = existing.buckets  # of images that were mended since, too
    generation = np.searchsorted(earlier, np.arange(len(samples)), side="right")
    order = np.lexsort((bucket, generation))
    values = [np.prod(each.shape) for each in identity.buckets] or [np.prod(identity.shape)]
    latent_bytes = int(max(values)) * np.dtype(identity.dtype).itemsize
    bytes_per_sample = latent_bytes * (1 + identity.deviation)
    packing = pack(
        np.ones(len(samples), np.int64),
        bytes_per_row=bytes_per_sample,
        shard_bytes=request.shard_bytes,
        batch_tokens=1 if vae is None else max(1, BATCH_PIXELS // int(np.prod(images.size))),
        rows_per_chunk=max(1, LATENT_CHUNK_BYTES // latent_bytes),
        num_threads=threads,
        earlier=earlier,
        breaks=(np.flatnonzero(np.diff(bucket[order])) + 1).tolist(),
    )
    manifest = LatentManifest(
        status="extracting",
        identity=identity,
        layout=packing.layout,
        provenance=provenance(source, request.vae if vae is None else vae.name),
        grown_from=latent_generations(samples, digests, packing, existing),
    )
    return LatentPlan(
        path=request.target,
        existing=existing,
        manifest=manifest,
        packing=packing,
        request=request,
        samples=samples,
        digests=digests,
        vae=vae,
        size=images.size,
        shapes=shapes,
        bucket=bucket,
        order=order,
        bytes_per_sample=bytes_per_sample,
    )


def _identity(
    located: "ModelFiles | None",
    size: tuple[int, int],
    shapes: list[tuple[int, int]],
    samples: SampleTable,
    digests: list[str | None],
) -> LatentIdentity:
    """Everything that the stored numbers depend on, known before any image is encoded."""
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
    """Digests of images; those that could not be read count as they were when the store was begun,
    since they may have been repaired meanwhile."""
    before, broken = store.samples["sha256"].to_pylist(), store.broken()
    pairs = enumerate(zip(before, digests, strict=False))
    old = [stored if stored is None or row in broken else now for row, (stored, now) in pairs]
    return old + digests[len(old) :]


@dataclass(frozen=True)
class _Task:
    """One shard of images to encode.

    Attributes:
        vae: None where latents are pixels.
        ids: sample_id of each file.
        size: height and width of images.
        bucket: number of their bucket; 0 where there are none.
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
    arrays = [np.zeros(shape, identity.dtype) for _ in store.names(task.bucket)]
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
        for array, codes in zip(arrays, _codes(vae, pixels), strict=True):
            array[[first + row for row in good]] = _stored(codes[good], identity.dtype)
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
        named = dict(zip(store.names(task.bucket), arrays, strict=True))
        written = store.complete_shard(named, receipt)
        if broken:
            store.quarantine_images(task.shard, broken)
        return written

    return Deferred(write)


def _codes(vae: Autoencoder | None, pixels: np.ndarray) -> list[np.ndarray]:
    """Stored arrays of images ``[n, 3, H, W]``: mean, and deviation where there is one."""
    if vae is None:
        return [pixels]
    return [codes for codes in vae.encode(pixels) if codes is not None]


def _stored(codes: np.ndarray, dtype: str) -> np.ndarray:
    """Codes in the stored dtype, all of them finite."""
    with np.errstate(over="ignore"):
        stored = codes.astype(dtype)
    if not np.isfinite(stored).all():
        raise InputError(
            f"the VAE gave numbers up to {np.abs(codes).max():g}, which {dtype} does not hold"
        )
    return stored


@lru_cache(maxsize=1)
def _load_vae(source: "ModelFiles", device: str) -> Autoencoder:
    """The VAE, loaded once per worker."""
    return Autoencoder(source, device)
