"""Latent stores: create, write one shard, read, finish. On disk as a feature store is, but for::

    samples.parquet    a row an input row
    latents.zarr/      a Zarr v3 group: mean, and deviation where the VAE has a posterior; with
                       buckets an array of each for every shape: mean-32x48

All arrays have the same shards and rows: where there are buckets, a shard is in those of one bucket
and takes nothing in others. Shapes: C channels, h x w latent.
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
from ...schemas.units import format_bytes
from .array import ShardedArray, allocate, new_group
from .base import Store
from .documents import StoreError, render_table, write_manifest

_SHOWN = 5  # broken images named in a message


class LatentStore(Store[LatentManifest]):
    """Encoded images, of each sample one."""

    kind = "latent"
    manifest_type = LatentManifest
    group = "latents.zarr"
    drop_broken = False
    """Finish without the samples whose images could not be read; set it before the store is
    filled."""

    @classmethod
    def create(cls, path: Path, manifest: LatentManifest, samples: pa.Table) -> "LatentStore":
        """Write tables, array metadata and, last, the manifest; no shard."""
        cls.prepare(path, ("samples.parquet",))
        write_whole(path / "samples.parquet", render_table(samples.cast(LATENT_SAMPLES_SCHEMA)))
        identity = manifest.identity
        with new_group(path / cls.group) as group:
            for name, shape in array_shapes(manifest).items():
                allocate(
                    group,
                    name,
                    manifest.layout,
                    shape,
                    np.dtype(identity.dtype),
                    ("sample", "channel", "y", "x"),
                    {"semroute": {"scale": identity.scale, "shift": identity.shift}},
                )
        write_manifest(path, manifest)
        return cls(path, manifest)

    @cached_property
    def arrays(self) -> dict[str, ShardedArray]:
        """The stored codes: ``mean``, and ``deviation`` where there is one; of each bucket that has
        samples."""
        used = np.unique(self.buckets).tolist() if self.manifest.identity.buckets else [0]
        names = [name for bucket in used for name in self.names(bucket)]
        for name in names:
            self.check_files(f"{self.group}/{name}/zarr.json")
        root, layout = self.path / self.group, self.manifest.layout
        return {name: ShardedArray(root / name, layout) for name in names}

    def names(self, bucket: int = 0) -> list[str]:
        """Names of a bucket's arrays: of the mean, then of the deviation where there is one."""
        return _names(self.manifest.identity, bucket)

    @cached_property
    def buckets(self) -> np.ndarray:
        """Bucket of each sample, int32 ``[samples]``; 0 where all latents have one shape."""
        return self.samples["bucket"].to_numpy()

    def shape(self, bucket: int = 0) -> tuple[int, int, int]:
        """C, h and w of a bucket's latents."""
        identity = self.manifest.identity
        return identity.buckets[bucket].shape if identity.buckets else identity.shape

    @cached_property
    def samples(self) -> pa.Table:
        """A row a sample (:data:`semroute.schemas.LATENT_SAMPLES_SCHEMA`)."""
        table = self.read_table("samples.parquet")
        if "row" not in table.column_names:  # of an early version, where it is the sample_id
            table = table.append_column(LATENT_SAMPLES_SCHEMA.field("row"), table["sample_id"])
        if "bucket" not in table.column_names:
            none = pa.array(np.zeros(len(table), np.int32))
            table = table.append_column(LATENT_SAMPLES_SCHEMA.field("bucket"), none)
        return table

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each sample's latent in the arrays of its bucket, int64 ``[samples]``."""
        return self.samples["row"].to_numpy()

    @cached_property
    def ids(self) -> np.ndarray:
        """Samples that have a latent, ascending: int64, all but those that were dropped."""
        everything = np.arange(len(self), dtype=np.int64)
        return np.setdiff1d(everything, self.manifest.identity.dropped, assume_unique=True)

    @property
    def has_deviation(self) -> bool:
        return self.manifest.identity.deviation

    def broken(self) -> dict[int, str]:
        """Samples of the shards written so far whose images could not be read, and why."""
        return {
            sample: reason
            for _, receipt in sorted(self.receipts().items())
            for sample, reason in receipt.broken.items()
        }

    def quarantine_images(self, shard: int, broken: Mapping[int, str]) -> None:
        """List images that could not be read, of a shard that is written."""
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
        """Shards that are not written in full, or that lack images; these are tried again, unless
        they are to be dropped."""
        remaining = super().remaining()
        if self.is_complete or self.drop_broken:
            return remaining
        lacking = {shard for shard, receipt in self.receipts().items() if receipt.broken}
        return sorted({*remaining, *lacking})

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            StoreError: shards remain, or images could not be read and are not to be dropped.
        """
        broken = self.broken()
        if broken and not self.drop_broken:
            shown = "\n  ".join(f"sample {i}: {text}" for i, text in [*broken.items()][:_SHOWN])
            more = f"\n  and {len(broken) - _SHOWN:,} more" if len(broken) > _SHOWN else ""
            raise StoreError(
                f"{len(broken):,} of {len(self):,} images cannot be read; they are listed in "
                f"{self.path / 'quarantine'}:\n  {shown}{more}\nAll others are written. Mend these "
                "and run the same command again, or leave their samples out of training with "
                "--drop-broken."
            )
        if broken:
            identity = self.manifest.identity.model_copy(update={"dropped": sorted(broken)})
            self.manifest = self.manifest.model_copy(update={"identity": identity})
        super().finish()

    def __len__(self) -> int:
        return self.manifest.identity.samples.num_samples

    def read(self, ids: Sequence[int] | np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Latents of samples, as the model sees them: float32 ``[n, C, h, w]``.

        Args:
            ids: samples, all of one bucket.
            noise: standard normal, float32 ``[n, C, h, w]``: what is read are draws from the
                posterior, mean + deviation * noise, where a deviation is stored. None: the means.

        Raises:
            InputError: no such sample, or it has no latent, or its shard is not written; or samples
                of several buckets.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise StoreError(
                f"samples {ids.min()} to {ids.max()} asked for; the store has 0 to {len(self) - 1}"
            )
        dropped = np.intersect1d(ids, self.manifest.identity.dropped)
        if len(dropped):
            raise StoreError(
                f"sample {dropped[0]} has no latent in {self.path}: its image could not be read. "
                "LatentStore.ids are those that have one."
            )
        identity = self.manifest.identity
        scale, shift = (_per_channel(value) for value in (identity.scale, identity.shift))
        buckets = np.unique(self.buckets[ids]).tolist() or [0]
        if len(buckets) > 1:
            raise StoreError(
                f"latents of {len(buckets)} shapes asked for at once; read those of one bucket at "
                "a time. LatentStore.buckets says in which bucket each sample is."
            )
        names, shape = self.names(buckets[0]), self.shape(buckets[0])
        codes = self._codes(names[0], ids, shape)
        if noise is not None and self.has_deviation:
            codes += self._codes(names[1], ids, shape) * noise
        return codes * scale + shift

    def _codes(self, name: str, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        codes = np.empty((len(ids), *shape), self.manifest.identity.dtype)
        rows = self.rows[ids]
        self.arrays[name].read(rows, rows + 1, codes)
        return codes.astype(np.float32)

    def facts(self) -> Summary:
        identity = self.manifest.identity
        num_dropped = len(identity.dropped)
        dropped = f", {num_dropped:,} of them dropped: their images could not be read"
        scale, shift = (_shown(value) for value in (identity.scale, identity.shift))
        vae: str = identity.vae
        if vae != "pixels":
            vae += f" ({self.manifest.provenance.model})"
        return Summary(
            f"LatentStore {self.path}",
            {
                "vae": vae,
                "samples": f"{len(self):,}" + (dropped if num_dropped else ""),
                "shape": self._shapes(),
                "codes": f"{identity.dtype}{', mean and deviation' * identity.deviation}; "
                f"latent = code * {scale} + {shift}",
                "bytes": format_bytes(self.num_bytes()),
                "state": self._state(),
            },
        )

    def bucket_counts(self) -> dict[str, int]:
        """Height x width in pixels of each bucket that has samples -> how many, most first."""
        found = np.bincount(self.buckets, minlength=len(self.manifest.identity.buckets))
        named = zip(self.manifest.identity.buckets, found.tolist(), strict=False)
        counts = {f"{bucket.height}x{bucket.width}": num for bucket, num in named if num}
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))

    def _shapes(self) -> str:
        identity = self.manifest.identity
        if not identity.buckets:
            return " x ".join(map(str, identity.shape))
        counts = [*self.bucket_counts().items()]
        shown = ", ".join(f"{name}: {num:,}" for name, num in counts[:_SHOWN])
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        return f"{len(counts)} of {len(identity.buckets)} buckets have samples: {shown}{more}"

    def _state(self) -> str:
        if self.is_complete:
            return "complete"
        broken = self.broken()
        lacking = f", {len(broken):,} images cannot be read" if broken else ""
        layout, remaining = self.manifest.layout, super().remaining()
        written = layout.num_shards - len(remaining)
        return f"extracting: {written} of {layout.num_shards} shards written{lacking}"


def array_shapes(manifest: LatentManifest) -> dict[str, tuple[int, int, int]]:
    """All arrays of a latent store, by name, with the shape of a latent in them."""
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
    """To be multiplied with ``[n, C, h, w]``: float32 ``[C or 1, 1, 1]``."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


def _shown(value: float | Sequence[float]) -> str:
    return "by channel" if isinstance(value, Sequence) else f"{value:.6g}"
