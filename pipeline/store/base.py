"""Base class of stores: manifest, checksums, receipts, quarantine, remaining shards."""

import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from ...schemas import (
    AnyManifest,
    Checksums,
    ConditioningManifest,
    FeatureManifest,
    LatentManifest,
    Quarantine,
    Receipt,
    Summary,
    WrittenFile,
    differences,
    digest,
    parse,
    refuse_differences,
)
from ...schemas.files import list_files, locate, read_files
from .documents import (
    CHECKSUMS,
    GROWING,
    MANIFEST,
    QUARANTINE,
    RECEIPTS,
    StoreError,
    check_digest,
    commit,
    read_checked,
    read_contract,
    read_manifest,
    read_shard_documents,
    shard_document,
    shard_of,
    write_contract,
    write_receipt,
)

M = TypeVar("M", FeatureManifest, LatentManifest, ConditioningManifest)
C = TypeVar("C", FeatureManifest, ConditioningManifest)
_NOT_COMPARED = {"status", "provenance"}  # manifest keys that may differ when a store is resumed


class Store(Generic[M]):
    """Common part of all kinds of store.

    Attributes:
        kind: name of the kind, for messages.
        manifest_type: contract of its manifest.
        group: name of its Zarr group.
    """

    kind: ClassVar[str]
    manifest_type: ClassVar[Any]
    group: ClassVar[str]

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Any]:
        """The sharded arrays of codes, by name."""

    @abstractmethod
    def summary(self) -> Summary:
        """The facts that a repr shows."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of entries: captions or samples."""

    def __init__(self, path: Path, manifest: M) -> None:
        self.path = path
        self.manifest: M = manifest

    def __reduce__(self) -> tuple[Any, ...]:
        """Path and manifest only: another process reads and opens the files itself."""
        return type(self), (self.path, self.manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, complete: bool = True) -> Self:
        """Open a store.

        Args:
            path: a folder, or the URL of one that fsspec knows (``s3://``, ``gs://``, ``hf://`` and
                more, each with its own package), which is read through zarr-python.
            complete: refuse a store that is not finished.

        Raises:
            StoreError: no store of this kind there, or not finished, or its manifest is damaged.
        """
        path = locate(path)
        document = read_manifest(path, cls.kind)
        expected = cls.manifest_type.model_fields["format"].default
        found = document.get("format") if isinstance(document, dict) else None
        if found != expected:
            raise StoreError(
                f"{path} is no {cls.kind} store: its manifest says {found!r} instead of "
                f"{expected!r}"
            )
        if (path / GROWING / MANIFEST).exists():
            raise StoreError(
                f"{path} was growing when it was stopped. Rerun the command that makes it to "
                "resume."
            )
        store = cls(path, parse(cls.manifest_type, document, str(path / MANIFEST)))
        store._check_manifest()
        if complete:
            store.check_complete()
        return store

    @classmethod
    def open_existing(cls, path: Path) -> Self | None:
        """The store at a path, finished or not; None where there is none yet.

        One that was stopped while it grew is put in order first.
        """
        if not (path / MANIFEST).exists():
            return None
        commit(path)
        return cls.open(path, complete=False)

    @cached_property
    def checksums(self) -> Checksums | None:
        """Checksums of files that are written once; None in a store of an early version."""
        path = self.path / CHECKSUMS
        return read_contract(path, Checksums) if path.exists() else None

    def _check_manifest(self) -> None:
        found = digest(self.manifest.unfinished(), early=True)
        if self.checksums and self.checksums.manifest != found:
            raise StoreError(
                f"{self.path} is damaged: {MANIFEST} and {CHECKSUMS} do not belong together. Put "
                "both back from a copy."
            )

    def read_file(self, name: str) -> pa.Buffer:
        """A file that is written once, every byte of it as written.

        Raises:
            StoreError: it is missing or damaged.
        """
        return read_checked(self.path, name, self.checksums)

    def check_files(self, prefix: str) -> None:
        """Read all files that are written once under a path; errors as for :meth:`read_file`."""
        listed = self.checksums.files if self.checksums else {}
        names = [name for name in listed if name.startswith(prefix)]
        try:
            contents = read_files(self.path, names)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error
        for name, content in contents.items():
            check_digest(self.path, name, content, self.checksums)

    def read_table(self, name: str) -> pa.Table:
        """A whole Parquet table; errors as for :meth:`read_file`."""
        return pyarrow.parquet.read_table(pa.BufferReader(self.read_file(name)))

    @property
    def is_complete(self) -> bool:
        """Whether the manifest says that every shard is written."""
        return self.manifest.status == "complete"

    def check_complete(self, *, files: bool = False) -> None:
        """Refuse a store that is not finished.

        Args:
            files: also look for the files of each shard, which may have gone since.

        Raises:
            StoreError: with the number of shards to be written.
        """
        if self.is_complete and not files:
            return
        remaining = self.remaining()
        if remaining or not self.is_complete:
            raise StoreError(
                f"{self.path} is not finished: {len(remaining)} of "
                f"{self.manifest.layout.num_shards} shards are to be written. Rerun the command "
                "that made it to resume."
            )

    def check_same(self, manifest: M) -> None:
        """Refuse to resume a store as another one.

        Raises:
            StoreError: with every key that differs, and both values.
        """
        refuse_differences(
            differences(_compared(manifest), _compared(self.manifest)),
            f"{self.path} was made differently (requested now, instead of stored)",
            "Run the command as it was, or name a new folder.",
            StoreError,
        )

    def receipts(self) -> dict[int, Receipt]:
        """Receipts by shard."""
        found = read_shard_documents(self.path, RECEIPTS, Receipt)
        return {receipt.shard: receipt for receipt in found}

    def receipt_times(self) -> dict[int, float]:
        """Time of each receipt, by shard: seconds since 1970 by the file system's clock."""
        entries = list_files(self.path, RECEIPTS)
        return {s: e.changed for n, e in entries.items() if (s := shard_of(n)) is not None}

    def remaining(self) -> list[int]:
        """Shards without a receipt, or with missing or incomplete files."""
        receipts = self.receipts()
        sizes = {name: e.num_bytes for name, e in list_files(self.path, self.group).items()}
        return [
            shard
            for shard in range(self.manifest.layout.num_shards)
            if shard not in receipts
            or any(sizes.get(n) != f.num_bytes for n, f in receipts[shard].files.items())
        ]

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray]) -> dict[str, WrittenFile]:
        """Write one whole shard of codes, by array ``[rows_per_shard, ...]``."""
        return {
            f"{self.group}/{name}/{file}": written
            for name, codes in arrays.items()
            for file, written in self.arrays[name].write_shard(shard, codes).items()
        }

    def complete_shard(self, arrays: Mapping[str, np.ndarray], receipt: Receipt) -> Receipt:
        """Write a shard, then its receipt, to which its files and the writing time are added."""
        started = time.perf_counter()
        files = self.write_shard(receipt.shard, arrays)
        seconds = {**receipt.seconds, "write": time.perf_counter() - started}
        written = receipt.model_copy(update={"files": files, "seconds": seconds})
        self.write_receipt(written)
        return written

    def write_receipt(self, receipt: Receipt) -> None:
        """Record a shard as written, and lift its quarantine."""
        write_receipt(self.path, receipt)

    def write_quarantine(self, quarantine: Quarantine) -> None:
        """Record a shard as failed, with its entries and the reason."""
        write_contract(self.path / shard_document(QUARANTINE, quarantine.shard), quarantine)

    def quarantined(self) -> dict[int, Quarantine]:
        """Failed shards, by number."""
        found = read_shard_documents(self.path, QUARANTINE, Quarantine)
        return {quarantine.shard: quarantine for quarantine in found}

    def reopen(self, shards: Sequence[int]) -> None:
        """Mark shards to be rewritten: their receipts are removed, the store is unfinished."""
        self.manifest = self.manifest.unfinished()
        write_contract(self.path / MANIFEST, self.manifest, early=True)
        for shard in shards:
            (self.path / shard_document(RECEIPTS, shard)).unlink(missing_ok=True)

    def finish(self) -> None:
        """Mark the store complete.

        Raises:
            StoreError: shards remain.
        """
        remaining = self.remaining()
        if remaining:
            raise StoreError(f"{self.path}: {len(remaining)} shards remain, e.g. {remaining[:5]}")
        check_unchanged(self)
        self.manifest = self.manifest.model_copy(update={"status": "complete"})
        write_contract(self.path / MANIFEST, self.manifest, early=True)

    def num_bytes(self) -> int:
        """Bytes of the shards written so far."""
        return sum(f.num_bytes for r in self.receipts().values() for f in r.files.values())

    def state(self) -> str:
        """``complete``, or how many shards are written."""
        if self.is_complete:
            return "complete"
        layout, remaining = self.manifest.layout, len(self.remaining())
        return f"extracting: {layout.num_shards - remaining} of {layout.num_shards} shards written"

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


class CaptionStore(Store[C]):
    """Common part of stores that hold something for every unique caption."""

    @cached_property
    def captions(self) -> pa.Table:
        """One row per unique caption, in store order; row 0 is the null caption."""
        return self.read_table("captions.parquet")

    @cached_property
    def samples(self) -> pa.Table:
        """One row per input row (:data:`semroute.schemas.SAMPLES_SCHEMA`)."""
        return self.read_table("samples.parquet")

    @cached_property
    def first_captions(self) -> np.ndarray:
        """First caption of each sample: ids for reading, int64 ``[samples]``."""
        return np.asarray(pc.list_element(self.samples["caption_ids"], 0).to_numpy())

    def check_source(
        self,
        source: str | os.PathLike[str],
        texts: Sequence[str],
        *,
        first_rows: bool = False,
        remedy: str = "",
    ) -> None:
        """Refuse a file that this store was not extracted from.

        Args:
            source: the file, for the message.
            texts: first caption of each row; with ``first_rows``, perhaps of the first rows only.
            remedy: what to do, a sentence at the end of the message.

        Raises:
            StoreError: the first captions of the stored samples are not these.
        """
        ids = self.first_captions[: len(texts)] if first_rows else self.first_captions
        if self.captions["text"].take(pa.array(ids)).to_pylist() != list(texts):
            raise StoreError(
                f"{self.path} was not extracted from {source}: the captions differ."
                f"{' ' * bool(remedy)}{remedy}"
            )

    def __len__(self) -> int:
        return self.manifest.identity.captions.num_captions

    def num_rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Number of rows of each caption, int64 ``[captions]``; errors as for :meth:`row_spans`."""
        starts, stops = self.row_spans(ids)
        return np.asarray(stops - starts)

    def row_spans(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row of some captions, and the row after the last of each: int64 ``[captions]``.

        Raises:
            StoreError: no such caption.
        """
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise StoreError(
                f"caption ids {ids.min()} to {ids.max()} asked for; the store has 0 to "
                f"{len(self) - 1}"
            )
        starts, stops = self._rows
        return starts[ids], stops[ids]

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """First row of every caption, and the row after its last."""
        return self.captions["row_start"].to_numpy(), self.captions["row_stop"].to_numpy()


def _compared(manifest: AnyManifest) -> dict[str, Any]:
    return manifest.unfinished().model_dump(mode="json", exclude=_NOT_COMPARED)


def check_unchanged(store: Store[Any]) -> None:
    """Refuse to go on with a store that another process has changed.

    Raises:
        StoreError: its manifest is not the one that was read or written here.
    """
    now = parse(store.manifest_type, read_manifest(store.path, store.kind), str(store.path))
    if now.unfinished().model_dump() != store.manifest.unfinished().model_dump():
        raise StoreError(
            f"{store.path} was changed by another process meanwhile, such as a driver that took "
            "this one for dead. Look at it with semroute status, and rerun the command."
        )
