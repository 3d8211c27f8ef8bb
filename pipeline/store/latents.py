"""Latent stores: created, written shard by shard, read, finished. Unlike feature stores, with::

    samples.parquet    one row per input row
    latents.zarr/      a Zarr v3 group: mean, and deviation if the VAE has a posterior; with
                       buckets, one array of each per shape: mean-32x48

All arrays have the same shards and rows. With buckets, a shard has a file only in the arrays of one
bucket. Shapes: C channels, h x w latent.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ...schemas import (
    LATENT_SAMPLES_SCHEMA,
    LatentIdentity,
    LatentManifest,
    Quarantine,
    Summary,
    write_whole,
)
from ...schemas.columns import numbers
from .array import ShardedArray, create_array, new_group
from .base import Store
from .checks.metadata import StoredArray
from .checks.tables import latent_faults
from .documents import (
    QUARANTINE,
    StoreError,
    prepare_folder,
    refuse_faults,
    render_table,
    write_manifest,
)
from .shard_file import ChunkSlices
from .views import summarise_latents

_SHOWN = 5  # unreadable images named in a message


class LatentStore(Store[LatentManifest]):
    """Encoded images, one per sample: ``len``, :meth:`read`, :attr:`ids`."""

    kind = "latent"
    manifest_type = LatentManifest
    group = "latents.zarr"
    tables = ("samples.parquet",)
    drop_broken = False
    """Finish without the samples whose images could not be read; set it before writing shards."""

    @classmethod
    def create(cls, path: Path, manifest: LatentManifest, samples: pa.Table) -> "LatentStore":
        """Write the table, the arrays' metadata and, last, the manifest; no shard."""
        prepare_folder(path, cls.kind, cls.group, cls.tables)
        write_whole(path / "samples.parquet", render_table(samples.cast(LATENT_SAMPLES_SCHEMA)))
        identity = manifest.identity
        with new_group(path / cls.group) as group:
            for name, shape in array_shapes(manifest).items():
                create_array(
                    group,
                    name,
                    manifest.layout,
                    shape,
                    np.dtype(identity.dtype),
                    ("sample", "channel", "y", "x"),
                    {"semroute": {"scale": identity.scale, "shift": identity.shift}},
                )
        return cls(path, write_manifest(path, manifest))

    @cached_property
    def arrays(self) -> dict[str, ShardedArray]:
        """The stored codes, ``mean`` and perhaps ``deviation``, of each bucket that has samples."""
        return {name: self.open_array(name) for name in self.stored_arrays}

    @cached_property
    def stored_arrays(self) -> dict[str, StoredArray]:
        used = np.unique(self.buckets).tolist() if self.manifest.identity.buckets else [0]
        dtype = np.dtype(self.manifest.identity.dtype).newbyteorder("<")
        return {
            name: StoredArray(self.shape(bucket), dtype, None)
            for bucket in used
            for name in self.names(bucket)
        }

    def names_of(self, shard: int) -> list[str]:
        """Names of the arrays that hold a shard: those of its bucket."""
        return self.names(self._shard_buckets.get(shard, 0))

    @cached_property
    def _shard_buckets(self) -> dict[int, int]:
        """Bucket of each shard."""
        shards, first = np.unique(
            self.rows // self.manifest.layout.rows_per_shard, return_index=True
        )
        return dict(zip(shards.tolist(), self.buckets[first].tolist(), strict=True))

    def names(self, bucket: int = 0) -> list[str]:
        """Names of a bucket's arrays: mean, then deviation if there is one."""
        return _names(self.manifest.identity, bucket)

    @property
    def buckets(self) -> np.ndarray:
        """Bucket of each sample, int32 ``[samples]``; 0 if all latents have one shape."""
        return self._places[1]

    def shape(self, bucket: int = 0) -> tuple[int, int, int]:
        """C, h and w of a bucket's latents."""
        identity = self.manifest.identity
        return identity.buckets[bucket].shape if identity.buckets else identity.shape

    @cached_property
    def samples(self) -> pa.Table:
        """One row per sample (:data:`semroute.schemas.LATENT_SAMPLES_SCHEMA`)."""
        return self._read_samples(LATENT_SAMPLES_SCHEMA)

    def _read_samples(self, schema: pa.Schema) -> pa.Table:
        """Some columns of the table, among them sample_id, row and bucket."""
        optional = ("row", "bucket")
        table = self.read_table("samples.parquet", schema, len(self), optional)
        if "row" not in table.column_names:  # an early version, in which it is the sample_id
            table = table.append_column(LATENT_SAMPLES_SCHEMA.field("row"), table["sample_id"])
        if "bucket" not in table.column_names:
            none = pa.array(np.zeros(len(table), np.int32))
            table = table.append_column(LATENT_SAMPLES_SCHEMA.field("bucket"), none)
        faults = latent_faults(table, self.manifest.layout, self.manifest.identity.buckets)
        refuse_faults(self.path / "samples.parquet", faults)
        return table

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and bucket of each sample: all of the table that reading needs to hold."""
        table = self.__dict__.get("samples")
        if table is None:
            names = ("sample_id", "row", "bucket")
            schema = pa.schema([LATENT_SAMPLES_SCHEMA.field(name) for name in names])
            table = self._read_samples(schema)
        return numbers(table["row"]), numbers(table["bucket"])

    def check_tables(self, *, all_columns: bool = True) -> None:
        _ = self.samples if all_columns else self._places

    @property
    def rows(self) -> np.ndarray:
        """Row of each sample's latent in the arrays of its bucket, int64 ``[samples]``."""
        return self._places[0]

    @cached_property
    def ids(self) -> np.ndarray:
        """Samples that have a latent, all but the dropped ones: int64, ascending."""
        samples = np.arange(len(self), dtype=np.int64)
        return np.setdiff1d(samples, self.manifest.identity.dropped, assume_unique=True)

    @property
    def has_deviation(self) -> bool:
        """Whether the deviation of the VAE's posterior is stored beside its mean."""
        return self.manifest.identity.deviation

    def broken(self) -> dict[int, str]:
        """Samples of the written shards whose images could not be read, with the reason."""
        return {
            sample: reason
            for _, receipt in sorted(self.receipts().items())
            for sample, reason in receipt.broken.items()
        }

    def quarantine_images(self, shard: int, broken: Mapping[int, str]) -> None:
        """List the unreadable images of a written shard."""
        lines = [f"sample {sample}: {reason}" for sample, reason in broken.items()]
        self.write_quarantine(
            Quarantine(
                shard=shard,
                entries=list(broken),
                reason=f"{len(broken)} images cannot be read",
                traceback="\n".join(lines),
            )
        )

    def remaining(self) -> list[int]:
        """Shards that are not fully written, or that lack images; the latter are tried again,
        unless :attr:`drop_broken` is set."""
        remaining = super().remaining()
        if self.is_complete or self.drop_broken:
            return remaining
        incomplete = {shard for shard, receipt in self.receipts().items() if receipt.broken}
        return sorted({*remaining, *incomplete})

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            StoreError: shards remain; or images could not be read, and :attr:`drop_broken` is not
                set.
        """
        broken = self.broken()
        if broken and not self.drop_broken:
            shown = "\n  ".join(f"sample {i}: {text}" for i, text in [*broken.items()][:_SHOWN])
            more = f"\n  and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
            raise StoreError(
                f"{len(broken):,} of {len(self):,} images cannot be read; they are listed in "
                f"{self.path / QUARANTINE}:\n  {shown}{more}\nAll others are written. Repair these "
                "and rerun the same command, or leave their samples out of training with "
                "--broken skip."
            )
        if broken:
            identity = self.manifest.identity.model_copy(update={"dropped": sorted(broken)})
            self.manifest = self.manifest.model_copy(update={"identity": identity})
        super().finish()

    def __len__(self) -> int:
        return self.manifest.identity.samples.num_samples

    def read(self, ids: Sequence[int] | np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Latents of samples as the model sees them: float32 ``[n, C, h, w]``.

        Args:
            ids: samples, all of one bucket.
            noise: standard normal, float32 ``[n, C, h, w]``, to sample from the posterior: mean +
                deviation * noise, if a deviation is stored. None: the means.

        Raises:
            InputError: no such sample, one without a latent, or one whose shard is not written; or
                samples of several buckets.
        """
        slices, names, shape = self._slices(ids)
        identity = self.manifest.identity
        scale, shift = (_per_channel(value) for value in (identity.scale, identity.shift))
        if noise is None or not self.has_deviation:
            names = names[:1]
        for name in names:
            self.arrays[name].request(slices)
        codes, *deviation = [self._codes(name, slices, (len(ids), *shape)) for name in names]
        if deviation:
            codes += deviation[0] * noise
        return codes * scale + shift

    def request(self, ids: Sequence[int] | np.ndarray, *, deviation: bool = False) -> None:
        """Ask the disk for what :meth:`read` will read, ahead of time, and do not wait for it.

        Args:
            deviation: of the posterior, too.

        Other args, errors: as for :meth:`read`.
        """
        slices, names, _ = self._slices(ids)
        for name in names if deviation else names[:1]:
            self.arrays[name].request(slices)

    def _slices(
        self, ids: Sequence[int] | np.ndarray
    ) -> tuple[ChunkSlices, list[str], tuple[int, int, int]]:
        """Slices of the latents of samples of one bucket, and the names and shape of its arrays."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise StoreError(
                f"samples {ids.min()} to {ids.max()} asked for; the store has 0 to {len(self) - 1}"
            )
        dropped = np.intersect1d(ids, self.manifest.identity.dropped)
        if len(dropped):
            raise StoreError(
                f"sample {dropped[0]} has no latent in {self.path}: its image could not be read. "
                "LatentStore.ids lists the samples that have one."
            )
        buckets = np.unique(self.buckets[ids]).tolist() or [0]
        if len(buckets) > 1:
            raise StoreError(
                f"latents of {len(buckets)} shapes asked for at once; read those of one bucket at "
                "a time. LatentStore.buckets has the bucket of each sample."
            )
        rows = self.rows[ids]
        slices = ChunkSlices.from_runs(rows, rows + 1, self.manifest.layout.rows_per_chunk)
        return slices, self.names(buckets[0]), self.shape(buckets[0])

    def _codes(self, name: str, slices: ChunkSlices, shape: tuple[int, ...]) -> np.ndarray:
        codes = np.empty(shape, self.manifest.identity.dtype)
        self.arrays[name].read_slices(slices, codes)
        return codes.astype(np.float32)

    def summary(self) -> Summary:
        return summarise_latents(self)

    def bucket_counts(self) -> dict[str, int]:
        """Height x width in pixels of each bucket that has samples -> their number, descending."""
        buckets = self.manifest.identity.buckets
        found = np.bincount(self.buckets, minlength=len(buckets)).tolist()
        pairs = zip(buckets, found, strict=False)
        counts = {f"{bucket.height}x{bucket.width}": num for bucket, num in pairs if num}
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

    def state(self) -> str:
        """As of any store; with the number of unreadable images."""
        if self.is_complete:
            return "complete"
        broken = self.broken()
        unreadable = f", {len(broken):,} images cannot be read" if broken else ""
        layout, remaining = self.manifest.layout, super().remaining()
        written = layout.num_shards - len(remaining)
        return f"extracting: {written} of {layout.num_shards} shards written{unreadable}"


def array_shapes(manifest: LatentManifest) -> dict[str, tuple[int, int, int]]:
    """Name of each array of a latent store -> shape of a latent in it."""
    identity = manifest.identity
    shapes = [bucket.shape for bucket in identity.buckets] or [identity.shape]
    return {name: each for i, each in enumerate(shapes) for name in _names(identity, i)}


def _names(identity: LatentIdentity, bucket: int) -> list[str]:
    names = ["mean", "deviation"] if identity.deviation else ["mean"]
    if not identity.buckets:
        return names
    _, height, width = identity.buckets[bucket].shape
    return [f"{name}-{height}x{width}" for name in names]


def _per_channel(value: float | Sequence[float]) -> np.ndarray:
    """Factor or summand for ``[n, C, h, w]``: float32 ``[C or 1, 1, 1]``."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)
