"""What a store says of itself: manifest, checksums, receipts, quarantine, and what remains."""

import hashlib
import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ...schemas import (
    LOCK_FILE,
    PARTIAL,
    Checksums,
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
from ...schemas.files import is_local, list_files, list_names, locate, read_file, read_files, remove
from .documents import (
    CHECKSUMS,
    GROWING,
    MANIFEST,
    C,
    StoreError,
    commit,
    parse_contract,
    read_contract,
    read_manifest,
    shard_of,
    write_contract,
)

M = TypeVar("M", FeatureManifest, LatentManifest)
_RECORDED = {"status", "provenance"}  # manifest keys that resume does not compare


class Store(Generic[M]):
    """What both kinds of store share: manifest, receipts, quarantine, state."""

    kind: ClassVar[str]
    manifest_type: ClassVar[Any]
    group: ClassVar[str]

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, Any]:
        """The sharded arrays of codes, by name."""

    def __init__(self, path: Path, manifest: M) -> None:
        self.path = path
        self.manifest: M = manifest

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, as Dask does, without what was read and opened here."""
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
        wanted = cls.manifest_type.model_fields["format"].default
        form = document.get("format") if isinstance(document, dict) else None
        if form != wanted:
            raise StoreError(
                f"{path} is no {cls.kind} store: its manifest says {form!r} instead of {wanted!r}"
            )
        if (path / GROWING / MANIFEST).exists():
            raise StoreError(
                f"{path} was growing when it was stopped. Run the command that makes it once more: "
                "it continues where it stopped."
            )
        store = cls(path, parse(cls.manifest_type, document, str(path / MANIFEST)))
        store._check_manifest()
        if complete:
            store.check_complete()
        return store

    @classmethod
    def begun(cls, path: Path) -> Self | None:
        """The store that was begun there, finished or not; None where there is none yet.

        One that was stopped while it grew is put in order first.
        """
        if not (path / MANIFEST).exists():
            return None
        commit(path)
        return cls.open(path, complete=False)

    @classmethod
    def prepare(cls, path: Path, tables: Sequence[str]) -> None:
        """An empty folder to create a store in; what a creation that was killed left is removed."""
        own = {cls.group, *tables, CHECKSUMS}
        own |= {f"{name}.tmp" for name in (*tables, CHECKSUMS, MANIFEST)} | {LOCK_FILE}
        if is_local(path) and path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; expected a new folder")
        held = list_names(path)
        if MANIFEST in held:
            raise StoreError(f"{path} was begun by another process meanwhile")
        foreign = sorted(held - own)
        if foreign:
            raise StoreError(
                f"{path} is not empty and no {cls.kind} store: it holds {', '.join(foreign[:5])}. "
                "Name a new folder."
            )
        if any(
            fnmatch(name, f"{cls.group}/*/c/*/*") and "/parameters/" not in name
            for name in list_files(path, cls.group)
        ):
            raise StoreError(
                f"{path} holds shards but no {MANIFEST}, without which they cannot be read or "
                "continued. Put it back, or name a new folder."
            )
        path.mkdir(parents=True, exist_ok=True)
        for name in held - {LOCK_FILE}:  # that is of the process that creates it
            remove(path / name)

    @cached_property
    def checksums(self) -> Checksums | None:
        """Of the files that are written once; None in a store of an early version."""
        path = self.path / CHECKSUMS
        return read_contract(path, Checksums) if path.exists() else None

    def _check_manifest(self) -> None:
        begun = digest(self.manifest.unfinished(), early=True)
        if self.checksums and self.checksums.manifest != begun:
            raise StoreError(
                f"{self.path} is damaged: {MANIFEST} and {CHECKSUMS} do not belong together. Put "
                "both back from a copy."
            )

    def read_file(self, name: str) -> pa.Buffer:
        """A file that is written once, of which every byte is as it was written.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.path / name
        try:
            if is_local(path):
                content = pa.memory_map(str(path)).read_buffer()
            else:
                content = pa.py_buffer(read_file(path))
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}") from error
        self._check_digest(name, content)
        return content

    def _check_digest(self, name: str, content: Any) -> None:
        known = self.checksums.files.get(name) if self.checksums else None
        if known and hashlib.sha256(content).hexdigest() != known:
            raise StoreError(
                f"{self.path / name} is damaged: its sha256 is not the one in {CHECKSUMS}. Put it "
                "back from a copy; semroute verify says what else there is."
            )

    def check_files(self, prefix: str) -> None:
        """Read what is written once under a path; errors as for :meth:`read_file`."""
        known = self.checksums.files if self.checksums else {}
        names = [name for name in known if name.startswith(prefix)]
        try:
            contents = read_files(self.path, names)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error
        for name, content in contents.items():
            self._check_digest(name, content)

    def read_table(self, name: str) -> pa.Table:
        """One of the Parquet tables, whole; errors as for :meth:`read_file`."""
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
        """Refuse to continue a store as another one.

        Raises:
            StoreError: with every key that differs, and both values.
        """
        refuse_differences(
            differences(self._compared(manifest), self._compared(self.manifest)),
            f"{self.path} was made otherwise; what you asked for now, against what it holds",
            "Run the command as it was, or name a new folder.",
            StoreError,
        )

    @staticmethod
    def _compared(manifest: M) -> dict[str, Any]:
        return manifest.unfinished().model_dump(mode="json", exclude=_RECORDED)

    def receipts(self) -> dict[int, Receipt]:
        """Receipts by shard."""
        return {receipt.shard: receipt for receipt in self._read_each("receipts", Receipt)}

    def receipt_times(self) -> dict[int, float]:
        """When receipts were written, by shard: seconds since 1970 by the file system's clock."""
        entries = list_files(self.path, "receipts")
        return {s: e.changed for n, e in entries.items() if (s := shard_of(n)) is not None}

    def remaining(self) -> list[int]:
        """Shards without a receipt, or whose files are not there in full."""
        receipts = self.receipts()
        sizes = {name: e.num_bytes for name, e in list_files(self.path, self.group).items()}
        return [
            shard
            for shard in range(self.manifest.layout.num_shards)
            if shard not in receipts
            or any(sizes.get(n) != f.num_bytes for n, f in receipts[shard].files.items())
        ]

    def _read_each(self, folder: str, kind: type[C]) -> list[C]:
        """The files of a folder that are about a shard each."""
        names = [n for n in list_files(self.path, folder) if shard_of(n) is not None]
        contents = read_files(self.path, names)
        return [parse_contract(self.path / name, contents[name], kind) for name in names]

    def write_shard(self, shard: int, arrays: Mapping[str, np.ndarray]) -> dict[str, WrittenFile]:
        """Write one whole shard of codes, by array ``[rows_per_shard, ...]``."""
        return {
            f"{self.group}/{name}/{file}": written
            for name, codes in arrays.items()
            for file, written in self.arrays[name].write_shard(shard, codes).items()
        }

    def complete_shard(self, arrays: Mapping[str, np.ndarray], receipt: Receipt) -> Receipt:
        """Write a shard, then its receipt, which gets the files and the seconds of writing."""
        started = time.perf_counter()
        files = self.write_shard(receipt.shard, arrays)
        seconds = {**receipt.seconds, "write": time.perf_counter() - started}
        written = receipt.model_copy(update={"files": files, "seconds": seconds})
        self.write_receipt(written)
        return written

    def write_receipt(self, receipt: Receipt) -> None:
        """Record a shard as done, and lift its quarantine."""
        sealed = receipt.model_copy(update={"sha256": ""})
        sealed = receipt.model_copy(update={"sha256": digest(sealed)})
        write_contract(self._shard_file("receipts", receipt.shard), sealed)
        self._shard_file("quarantine", receipt.shard).unlink(missing_ok=True)

    def write_quarantine(self, quarantine: Quarantine) -> None:
        """Record a shard as failed, with its entries and the reason."""
        path = self._shard_file("quarantine", quarantine.shard)
        write_contract(path, quarantine)

    def quarantined(self) -> dict[int, Quarantine]:
        """Failed shards, by number."""
        return {found.shard: found for found in self._read_each("quarantine", Quarantine)}

    def _shard_file(self, folder: str, shard: int) -> Path:
        return self.path / folder / f"shard-{shard:06d}.json"

    def reopen(self, shards: Sequence[int]) -> None:
        """Have shards written anew: the store is no longer complete, their receipts are gone."""
        self.manifest = self.manifest.unfinished()
        write_contract(self.path / MANIFEST, self.manifest)
        for shard in shards:
            self._shard_file("receipts", shard).unlink(missing_ok=True)

    def sweep(self) -> list[int]:
        """Remove what killed writers left of shards: the bytes of each file.

        Whoever still writes one of these was given up, and fails when it is done.
        """
        if not is_local(self.path):  # an object is there whole or not at all
            return []
        left = []
        for file in self.path.rglob(f"*{PARTIAL}"):
            with suppress(FileNotFoundError):  # its writer was quicker
                size = file.stat().st_size
                file.unlink()
                left.append(size)
        return left

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
        write_contract(self.path / MANIFEST, self.manifest)

    def num_bytes(self) -> int:
        """Bytes of the shards written so far."""
        return sum(f.num_bytes for r in self.receipts().values() for f in r.files.values())

    def facts(self) -> Summary:
        """What this store is, for a repr; every kind of store has its own."""
        return Summary(f"{type(self).__name__} {self.path}", {"state": self._state()})

    def __repr__(self) -> str:
        return str(self.facts())

    def _repr_html_(self) -> str:
        return self.facts()._repr_html_()

    def _state(self) -> str:
        if self.is_complete:
            return "complete"
        layout, remaining = self.manifest.layout, len(self.remaining())
        return f"extracting: {layout.num_shards - remaining} of {layout.num_shards} shards written"


def check_unchanged(store: Store[Any]) -> None:
    """Refuse to go on where another process has changed what the store is.

    Raises:
        StoreError: its manifest is not the one that was read or written here.
    """
    now = parse(store.manifest_type, read_manifest(store.path, store.kind), str(store.path))
    if now.unfinished().model_dump() != store.manifest.unfinished().model_dump():
        raise StoreError(
            f"{store.path} was changed by another process meanwhile, such as a driver that took "
            "this one for dead. Look at it with semroute status, and run the command again."
        )
