"""Latent stores: create, write one shard, read, finish. On disk as a feature store is, but for::

    samples.parquet    a row an input row
    latents.zarr/      a Zarr v3 group: mean, and deviation where the VAE has a posterior

Shapes: C channels, h x w latent.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..schemas import (
    LATENT_SAMPLES_SCHEMA,
    Facts,
    LatentManifest,
    Quarantine,
    write_whole,
)
from .layout import format_bytes
from .ledger import Ledger, StoreError, render_table, write_manifest
from .shards import RowArray, allocate, new_group

_SHOWN = 5  # broken images named in a message


class LatentStore(Ledger[LatentManifest]):
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
            for name in _names(manifest):
                allocate(
                    group,
                    name,
                    manifest.layout,
                    identity.shape,
                    np.dtype(identity.dtype),
                    ("sample", "channel", "y", "x"),
                    {"semroute": {"scale": identity.scale, "shift": identity.shift}},
                )
        write_manifest(path, manifest)
        return cls(path, manifest)

    @cached_property
    def arrays(self) -> dict[str, RowArray]:
        """The stored codes: ``mean``, and ``deviation`` where there is one."""
        for name in _names(self.manifest):
            self.check_files(f"{self.group}/{name}/zarr.json")
        root, layout = self.path / self.group, self.manifest.layout
        return {name: RowArray(root / name, layout) for name in _names(self.manifest)}

    @cached_property
    def samples(self) -> pa.Table:
        """A row a sample (:data:`semroute.schemas.LATENT_SAMPLES_SCHEMA`)."""
        table = self.read_table("samples.parquet")
        if "row" not in table.column_names:  # of an early version, where it is the sample_id
            table = table.append_column(LATENT_SAMPLES_SCHEMA.field("row"), table["sample_id"])
        return table

    @cached_property
    def rows(self) -> np.ndarray:
        """Row of each sample's latent in the arrays, int64 ``[samples]``, ascending."""
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
            noise: standard normal, float32 ``[n, C, h, w]``: what is read are draws from the
                posterior, mean + deviation * noise, where a deviation is stored. None: the means.

        Raises:
            InputError: no such sample, or it has no latent, or its shard is not written.
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
        codes = self._codes("mean", ids)
        if noise is not None and self.has_deviation:
            codes += self._codes("deviation", ids) * noise
        return codes * scale + shift

    def _codes(self, name: str, ids: np.ndarray) -> np.ndarray:
        identity = self.manifest.identity
        codes = np.empty((len(ids), *identity.shape), identity.dtype)
        rows = self.rows[ids]
        self.arrays[name].read(rows, rows + 1, codes)
        return codes.astype(np.float32)

    def facts(self) -> Facts:
        identity = self.manifest.identity
        num_dropped = len(identity.dropped)
        dropped = f", {num_dropped:,} of them dropped: their images could not be read"
        scale, shift = (_shown(value) for value in (identity.scale, identity.shift))
        vae: str = identity.vae
        if vae != "pixels":
            vae += f" ({self.manifest.provenance.model})"
        return Facts(
            f"LatentStore {self.path}",
            {
                "vae": vae,
                "samples": f"{len(self):,}" + (dropped if num_dropped else ""),
                "shape": " x ".join(map(str, identity.shape)),
                "codes": f"{identity.dtype}{', mean and deviation' * identity.deviation}; "
                f"latent = code * {scale} + {shift}",
                "bytes": format_bytes(self.num_bytes()),
                "state": self._state(),
            },
        )

    def _state(self) -> str:
        if self.is_complete:
            return "complete"
        broken = self.broken()
        lacking = f", {len(broken):,} images cannot be read" if broken else ""
        layout, remaining = self.manifest.layout, super().remaining()
        written = layout.num_shards - len(remaining)
        return f"extracting: {written} of {layout.num_shards} shards written{lacking}"


def _names(manifest: LatentManifest) -> tuple[str, ...]:
    return ("mean", "deviation") if manifest.identity.deviation else ("mean",)


def _per_channel(value: float | Sequence[float]) -> np.ndarray:
    """To be multiplied with ``[n, C, h, w]``: float32 ``[C or 1, 1, 1]``."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


def _shown(value: float | Sequence[float]) -> str:
    return "by channel" if isinstance(value, Sequence) else f"{value:.6g}"
