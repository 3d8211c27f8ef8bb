"""Base class of stores: manifest, checksums, receipts, quarantine, remaining shards."""

import os
import re
import sys
import time
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

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
from ...schemas.files import inside, is_local, list_files, locate, read_files, size_of
from ...schemas.json_file import MAX_BYTES
from .array import ShardedArray, shard_name
from .checks.manifest import manifest_faults
from .checks.metadata import METADATA, StoredArray
from .checks.parquet import READ_ERRORS, max_file_bytes, read_parquet
from .checks.receipts import receipt_faults
from .documents import (
    CHECKSUMS,
    GROWING,
    MANIFEST,
    QUARANTINE,
    RECEIPTS,
    ShardTooLargeError,
    StoreError,
    check_digest,
    check_same_bytes,
    commit,
    is_shard_document,
    read_checked,
    read_contract,
    read_manifest,
    read_shard_documents,
    refuse_faults,
    shard_document,
    shard_of,
    write_contract,
    write_receipt,
)
from .remote.chunks import ReadAhead

M = TypeVar("M", FeatureManifest, LatentManifest, ConditioningManifest)
C = TypeVar("C", FeatureManifest, ConditioningManifest)
_FEW_SHARDS = 10_000  # to which anything may count, whatever is there
_ONCE = re.compile(r"([^/]+/)*zarr\.json|(layer|parameters/[a-z]+)/c(/[0-9]+)+")
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
    tables: ClassVar[tuple[str, ...]]
    """File names of its tables, that of the entries first."""

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Any]:
        """The sharded arrays of codes, by name."""

    @property
    @abstractmethod
    def stored_arrays(self) -> Mapping[str, StoredArray]:
        """The same as the manifest says that they are; no array is opened."""

    @abstractmethod
    def check_tables(self, *, all_columns: bool = True) -> None:
        """Read the tables, and refuse them if they contradict the manifest.

        Args:
            all_columns: otherwise those that reading rows needs; the rest is checked when it is
                first read.

        Raises:
            StoreError: with the file and the first faults.
        """

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
    def open(
        cls, path: str | os.PathLike[str], *, complete: bool = True, all_columns: bool = True
    ) -> Self:
        """Open a store.

        Args:
            path: a folder, or the URL of one that fsspec knows (``s3://``, ``gs://``, ``hf://`` and
                more, each with its own package).
            complete: refuse a store that is not finished.
            all_columns: of its tables, read and check all columns, and not only those that reading
                rows needs. Texts and token ids take most of the time and memory.

        Raises:
            StoreError: no store of this kind there, or not finished, or its manifest is damaged; or
                tables or arrays contradict it, which is found out of an unfinished store, and of
                other columns, when they are first read.
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
        refuse_faults(path / MANIFEST, manifest_faults(store.manifest, len(store)))
        store._check_manifest()
        if complete:
            store.check_complete()
            store.check(all_columns=all_columns)
        return store

    @classmethod
    def open_existing(cls, path: Path) -> Self | None:
        """The store at a path, finished or not; None where there is none yet.

        One that was stopped while it grew is put in order first.
        """
        if not (path / MANIFEST).exists():
            return None
        list_files(path)  # refuses links, through which a writer would leave the store
        commit(path)
        return cls.open(path, complete=False)

    @cached_property
    def checksums(self) -> Checksums | None:
        """Checksums of files that are written once; None in a store of an early version."""
        try:
            return read_contract(self.path / CHECKSUMS, Checksums)
        except FileNotFoundError:
            return None

    def _check_manifest(self) -> None:
        found = digest(self.manifest.unfinished(), early=True)
        if self.checksums and self.checksums.manifest != found:
            raise StoreError(
                f"{self.path} is damaged: {MANIFEST} and {CHECKSUMS} do not belong together. Put "
                "both back from a copy."
            )

    def check(self, *, all_columns: bool = True) -> None:
        """Refuse tables and arrays that contradict the manifest, before a shard is read.

        Args:
            all_columns: as for :meth:`check_tables`.

        Raises:
            StoreError: with the file and what is wrong.
        """
        self._check_version()
        self.check_tables(all_columns=all_columns)
        for name in self.stored_arrays:
            self.open_array(name, direct=False)

    def _check_version(self) -> None:
        """Refuse a store without checksums whose receipts are of a version that wrote them."""
        if self.checksums is not None:
            return
        entries = list_files(self.path, RECEIPTS)
        for name in [name for name in entries if is_shard_document(name, RECEIPTS)][:1]:
            if read_contract(self.path / name, Receipt).sha256:
                raise StoreError(
                    f"{self.path} has lost {CHECKSUMS}, without which no file can be checked. Put "
                    "it back from a copy."
                )

    def open_array(self, name: str, *, direct: bool | None = None) -> ShardedArray:
        """One of the sharded arrays, if it is what the manifest says.

        Args:
            direct: as for :class:`.ShardedArray`; None: refuse one that cannot be read so.

        Raises:
            StoreError: it is another array.
        """
        file, expected = f"{self.group}/{name}/{METADATA}", self.stored_arrays[name]
        self.read_file(file)
        array = ShardedArray(
            inside(self.path, f"{self.group}/{name}"), self.manifest.layout, direct=direct
        )
        refuse_faults(self.path / file, array.faults(expected, any_form=direct is False))
        return array

    def read_file(self, name: str, *, limit: int = MAX_BYTES) -> pa.Buffer:
        """A file that is written once, every byte of it as written.

        Args:
            limit: largest size, in bytes.

        Raises:
            StoreError: it is missing, damaged or larger.
        """
        return read_checked(self.path, name, self.checksums, limit)

    def read_files(self, names: Iterable[str]) -> dict[str, Any]:
        """Files that are written once; objects are read concurrently. Errors as for
        :meth:`read_file`, but of any size."""
        names = [*names]
        if is_local(self.path):
            return {name: self.read_file(name, limit=sys.maxsize) for name in names}
        try:
            contents = read_files(self.path, names)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error
        for name, content in contents.items():
            check_digest(self.path, name, content, self.checksums)
        return contents

    def read_table(
        self, name: str, schema: pa.Schema, num_rows: int, optional: Collection[str] = ()
    ) -> pa.Table:
        """A Parquet table.

        Args:
            schema: its columns; others are not read.
            num_rows: that the manifest says it has.
            optional: columns that need not be there.

        Raises:
            StoreError: it is missing or damaged, or another table.
        """
        content = self.read_file(name, limit=max_file_bytes(num_rows))
        try:
            return read_parquet(content, schema, num_rows, optional)
        except READ_ERRORS as error:
            raise StoreError(f"{self.path / name} cannot be used: {error}") from error

    @property
    def is_complete(self) -> bool:
        """Whether the manifest says that every shard is written."""
        return self.manifest.status == "complete"

    def watch(self) -> None:
        """From now on, a file of a shard that changes is an error when it is read.

        Without, those are watched that were read already. Objects behind a URL are not watched, nor
        shards that come and go within a disk budget.
        """
        if self.has_budget:
            return
        for array in self.arrays.values():
            array.watch()

    def fetch_by(self, ahead: ReadAhead, *, whole: bool = False) -> None:
        """Fetch the chunks of shards, by way of what others share too, instead of mapping them.

        Args:
            whole: fetch the rest of a shard once something of it is requested.
        """
        if not self.has_budget:  # its shards come and go
            for array in self.arrays.values():
                array.fetch_by(ahead, digest(self.manifest), whole=whole)

    @property
    def has_budget(self) -> bool:
        """Whether shards come and go within a disk budget."""
        return self.manifest.status == "budget"

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
        if self.has_budget:
            num_shards = self.manifest.layout.num_shards
            raise StoreError(
                f"{self.path} has a disk budget: {num_shards - len(remaining)} of {num_shards} "
                "shards are on disk now, for the runs that it follows. Whatever else needs a "
                "complete store: rerun the command that made it, without --budget, to complete it."
            )
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
        """Receipts by shard.

        Raises:
            StoreError: one is damaged, or not of its shard.
        """
        self._check_version()
        found = read_shard_documents(self.path, RECEIPTS, Receipt)
        for shard, receipt in found.items():
            file = self.path / shard_document(RECEIPTS, shard)
            refuse_faults(file, self.receipt_faults(receipt, shard))
        return found

    def receipt_faults(self, receipt: Receipt, shard: int) -> Iterator[str]:
        """What a receipt of a shard says that cannot be."""
        return receipt_faults(receipt, shard, self.manifest.layout, self.shard_files(shard))

    def shard_files(self, shard: int) -> set[str]:
        """Paths of the files of a shard, relative to the store."""
        return {
            f"{self.group}/{name}/{shard_name(shard, len(self.stored_arrays[name].row_shape))}"
            for name in self.names_of(shard)
        }

    def is_written_once(self, name: str) -> bool:
        """Whether a path, relative to the store, is one of a table, or of the Zarr group's files
        that are no shards."""
        group, _, rest = name.partition("/")
        return name in self.tables or (group == self.group and _ONCE.fullmatch(rest) is not None)

    def names_of(self, shard: int) -> Collection[str]:
        """Names of the arrays that hold a shard."""
        return self.stored_arrays

    def receipt_times(self) -> dict[int, float]:
        """Time of each receipt, by shard: seconds since 1970 by the file system's clock."""
        entries = list_files(self.path, RECEIPTS)
        return {s: e.changed for n, e in entries.items() if (s := shard_of(n)) is not None}

    def remaining(self) -> list[int]:
        """Shards without a receipt, or with missing or incomplete files.

        Raises:
            StoreError: the manifest says that there are more shards than entries can be.
        """
        num_shards = self.manifest.layout.num_shards
        if num_shards > _FEW_SHARDS and num_shards > size_of(inside(self.path, self.tables[0])):
            raise StoreError(f"{self.path / self.tables[0]} is too small for {num_shards:,} shards")
        receipts = self.receipts()
        sizes = {name: e.num_bytes for name, e in list_files(self.path, self.group).items()}
        return [
            shard
            for shard in range(num_shards)
            if shard not in receipts
            or any(sizes.get(n) != f.num_bytes for n, f in receipts[shard].files.items())
        ]

    def write_shard(
        self, shard: int, arrays: Mapping[str, np.ndarray], max_bytes: int | None = None
    ) -> dict[str, WrittenFile]:
        """Write one whole shard of codes, by array ``[rows_per_shard, ...]``.

        Args:
            max_bytes: that its files may take together.

        Raises:
            ShardTooLargeError: they take more; nothing is written.
            StoreError: the store has a disk budget, and the shard had other bytes before it was
                evicted; nothing is written.
        """
        coded = {name: self.arrays[name].code_shard(shard, codes) for name, codes in arrays.items()}
        files = {f"{self.group}/{name}/{each.name}": each.file for name, each in coded.items()}
        num_bytes = sum(file.num_bytes for file in files.values())
        if max_bytes is not None and num_bytes > max_bytes:
            raise ShardTooLargeError(
                f"shard {shard} takes {num_bytes:,} bytes; there is room for {max_bytes:,}",
                num_bytes,
            )
        if self.has_budget:
            check_same_bytes(self.path, shard, files)
        for name, each in coded.items():
            self.arrays[name].write_coded(each)
        return files

    def complete_shard(
        self, arrays: Mapping[str, np.ndarray], receipt: Receipt, max_bytes: int | None = None
    ) -> Receipt:
        """Write a shard, then its receipt, to which its files and the writing time are added.

        The receipt of a shard that was evicted is kept as it is. Args, errors: as for
        :meth:`write_shard`.
        """
        started = time.perf_counter()
        files = self.write_shard(receipt.shard, arrays, max_bytes)
        seconds = {**receipt.seconds, "write": time.perf_counter() - started}
        written = receipt.model_copy(update={"files": files, "seconds": seconds})
        name = shard_document(RECEIPTS, receipt.shard)
        if not (self.has_budget and (self.path / name).exists()):
            self.write_receipt(written)
        return written

    def write_receipt(self, receipt: Receipt) -> None:
        """Record a shard as written, and lift its quarantine."""
        write_receipt(self.path, receipt)

    def is_gone(self) -> bool:
        """Whether somebody has moved or removed the store since it was opened."""
        return not (self.path / MANIFEST).exists()

    def write_quarantine(self, quarantine: Quarantine) -> None:
        """Record a shard as failed, with its entries and the reason."""
        file = inside(self.path, shard_document(QUARANTINE, quarantine.shard))
        write_contract(file, quarantine)

    def quarantined(self) -> dict[int, Quarantine]:
        """Failed shards, by number."""
        return read_shard_documents(self.path, QUARANTINE, Quarantine)

    def reopen(self, shards: Sequence[int]) -> None:
        """Mark shards to be rewritten: their receipts are removed, the store is unfinished."""
        self.manifest = self.manifest.unfinished()
        write_contract(self.path / MANIFEST, self.manifest, early=True)
        for shard in shards:
            inside(self.path, shard_document(RECEIPTS, shard)).unlink(missing_ok=True)

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
        """Bytes of the shards written so far; with a disk budget, of those on disk."""
        receipts = self.receipts()
        if self.has_budget:
            for shard in self.remaining():
                receipts.pop(shard, None)
        return sum(f.num_bytes for r in receipts.values() for f in r.files.values())

    def state(self) -> str:
        """``complete``, or how many shards are written."""
        if self.is_complete:
            return "complete"
        layout, remaining = self.manifest.layout, len(self.remaining())
        if self.has_budget:
            on_disk = layout.num_shards - remaining
            evicted = len(self.receipts()) - on_disk
            return (
                f"with a disk budget: {on_disk} of {layout.num_shards} shards on disk, "
                f"{evicted} evicted"
            )
        return f"extracting: {layout.num_shards - remaining} of {layout.num_shards} shards written"

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


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
