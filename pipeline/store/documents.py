"""The JSON files and tables of a store, as functions over its path.

A store is a folder with a manifest; checksums of what is written once; and one receipt, or one
quarantine, per shard. Each is written whole by :mod:`semroute.schemas.atomic`.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from io import BytesIO
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from ...schemas import (
    BUDGET,
    LOCK_FILE,
    PARTIAL,
    SAMPLES_EXTRA,
    SAMPLES_SCHEMA,
    Against,
    Checksums,
    ConditioningManifest,
    Contract,
    FeatureManifest,
    InputError,
    LatentManifest,
    Receipt,
    StoreBudget,
    WrittenFile,
    digest,
    parse,
    publish,
    render,
    write_document,
)
from ...schemas.escaping import one_line
from ...schemas.files import (
    StorageError,
    answer,
    inside,
    is_local,
    list_files,
    list_names,
    open_file,
    read_file,
    read_files,
    remove,
    scan,
)
from ...schemas.json_file import MAX_BYTES, load_json

C = TypeVar("C", bound=Contract)
M = TypeVar("M", FeatureManifest, LatentManifest, ConditioningManifest)
MANIFEST = "manifest.json"
CHECKSUMS = "checksums.json"
AGAINST = "against.json"
"""Written when a finished store was compared with a pipeline, and passed."""
RECEIPTS, QUARANTINE = "receipts", "quarantine"
GROWING = "growing"
"""Folder in which the files of a larger store are staged before they replace those of the store."""
_SHOWN = 3  # faults of a file that are named
_SHARD_DOCUMENT = re.compile(r"/shard-(\d{6,})\.json$")


class ShardTooLargeError(InputError):
    """A shard takes more bytes than there is room for; none of them was written.

    Attributes:
        num_bytes: that it takes.
    """

    def __init__(self, message: str, num_bytes: int = 0) -> None:
        super().__init__(message)
        self.num_bytes = num_bytes


class StoreError(InputError):
    """A store is missing, unfinished, damaged, or not the one that is needed."""


def read_manifest(path: Path, kind: str) -> Any:
    """The JSON document in a store's manifest, of whatever kind the store is.

    Raises:
        StoreError: no manifest, or a damaged one.
        StorageError: the place cannot be read.
    """
    try:
        return load_json(read_file(path / MANIFEST, limit=MAX_BYTES), str(path / MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path} is no {kind} store: it has no {MANIFEST}{answer(error)}"
        ) from error
    except InputError as error:
        if isinstance(error, StorageError) and not is_local(path):
            raise
        raise StoreError(str(error)) from error
    except OSError as error:
        if is_local(path):
            raise
        raise StorageError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def write_manifest(path: Path, manifest: M) -> M:
    """Write the checksums of all other files, then the manifest, with which the store exists.

    Returns:
        The manifest as reading it gives it: every key is set.
    """
    names = [name for name in list_files(path) if name != LOCK_FILE]
    checksums = {name: digest_file(path / name) for name in names}
    write_contract(path / CHECKSUMS, Checksums(manifest=digest(manifest), files=checksums))
    write_contract(path / MANIFEST, manifest)
    return type(manifest).model_validate(manifest.model_dump())


def prepare_folder(path: Path, kind: str, group: str, tables: Sequence[str]) -> None:
    """Make an empty folder to create a store in, without what a killed creation left there.

    Args:
        kind: of the store, for messages.
        group: name of its Zarr group.
        tables: names of its tables.

    Raises:
        StoreError: the path holds a store, shards without a manifest, or files of others.
    """
    if is_local(path) and path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; expected a new folder")
    names = list_names(path)
    if MANIFEST in names:
        raise StoreError(f"{path} was created by another process meanwhile")
    own = {group, *tables, CHECKSUMS, LOCK_FILE}
    own |= {f"{name}.tmp" for name in (*tables, CHECKSUMS, MANIFEST)}
    foreign = sorted(names - own)
    if foreign:
        raise StoreError(
            f"{path} is not empty and no {kind} store: it holds {', '.join(foreign[:5])}. Name a "
            "new folder."
        )
    if any(
        fnmatch(name, f"{group}/*/c/*/*") and "/parameters/" not in name
        for name in list_files(path, group)
    ):
        raise StoreError(
            f"{path} holds shards but no {MANIFEST}, without which they cannot be read or "
            "resumed. Put it back, or name a new folder."
        )
    path.mkdir(parents=True, exist_ok=True)
    for name in names - {LOCK_FILE}:  # the lock is of the process that creates the store
        remove(path / name)


def commit(path: Path) -> None:
    """Move staged files into place, the manifest last; drop them if staging did not finish."""
    staged = inside(path, GROWING)
    names = list_files(staged)
    if MANIFEST in names:
        for name in sorted(names, key=lambda name: name == MANIFEST):
            try:
                publish(inside(staged, name), inside(path, name))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                raise StoreError(
                    f"{staged / name} has no place in {path}: {error.strerror}. Put the store back "
                    "from a copy."
                ) from error
    remove(staged)


def remove_partial_files(path: Path) -> list[int]:
    """Remove unfinished shard files that killed writers left: the size of each in bytes.

    A writer that was given up but still writes one of them fails at its end.
    """
    if not is_local(path):  # an object is written whole or not at all
        return []
    sizes = []
    for name, entry in scan(path).files.items():
        if name.endswith(PARTIAL):
            with suppress(FileNotFoundError):  # its writer finished first
                inside(path, name).unlink()
                sizes.append(entry.num_bytes)
    return sizes


def shard_document(folder: str, shard: int) -> str:
    """Path of a shard's file in ``receipts`` or ``quarantine``, relative to the store."""
    return f"{folder}/shard-{shard:06d}.json"


def shard_of(name: str) -> int | None:
    """Number of the shard that a receipt or quarantine is about; None for other files."""
    match = _SHARD_DOCUMENT.search(name)
    return int(match[1]) if match else None


def is_shard_document(name: str, folder: str) -> bool:
    """Whether a name is one of those that :func:`shard_document` gives."""
    shard = shard_of(name)
    return shard is not None and name == shard_document(folder, shard)


def read_shard_documents(path: Path, folder: str, kind: type[C]) -> dict[int, C]:
    """All receipts, or all quarantines, by the shard that the file's name says; files of other
    names are left alone.

    Raises:
        StoreError: one is damaged.
    """
    entries = list_files(path, folder)
    names = [name for name in entries if is_shard_document(name, folder)]
    for name in names:
        if entries[name].num_bytes > MAX_BYTES:
            raise StoreError(f"{path / name} has {entries[name].num_bytes:,} bytes")
    contents = read_files(path, names)
    return {
        shard: parse_contract(path / name, contents[name], kind)
        for name in names
        if (shard := shard_of(name)) is not None
    }


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Record a shard as written, sealed with the receipt's own sha256, and lift its quarantine."""
    unsealed = receipt.model_copy(update={"sha256": ""})
    sealed = receipt.model_copy(update={"sha256": digest(unsealed)})
    write_contract(inside(path, shard_document(RECEIPTS, receipt.shard)), sealed)
    inside(path, shard_document(QUARANTINE, receipt.shard)).unlink(missing_ok=True)


def check_same_bytes(path: Path, shard: int, files: Mapping[str, WrittenFile]) -> None:
    """Refuse other bytes for a shard that was evicted than those that its receipt proves.

    Raises:
        StoreError: they differ.
    """
    try:
        known = read_contract(path / shard_document(RECEIPTS, shard), Receipt).files
    except FileNotFoundError:
        return
    different = sorted(name for name in known if known[name] != files.get(name))
    if different:
        raise StoreError(
            f"shard {shard} was evicted and is encoded to other bytes now ({different[0]}), so "
            "runs would not be trained as from a full store. Its receipt is of another device, or "
            "of other versions of libraries: extract with those, or make a new store"
        )


def write_against(path: Path, against: Against) -> None:
    """Record that a store holds what a pipeline reads."""
    write_contract(path / AGAINST, against)


def passed_against(path: Path, pipeline_class: str, files: Mapping[str, str]) -> bool:
    """Whether a store was compared with a pipeline, and holds what that pipeline reads.

    Args:
        pipeline_class: in diffusers.
        files: file -> sha256, of the pipeline's text encoders and tokenizers, perhaps among others;
            see :func:`semroute.pipeline.models.text_pipelines.find_text_pipeline`.

    Raises:
        StoreError: the record is damaged.
    """
    try:
        against = read_contract(path / AGAINST, Against)
    except FileNotFoundError:
        return False
    return against.pipeline_class == pipeline_class and against.files.items() <= files.items()


def check_digest(path: Path, name: str, content: Any, checksums: Checksums | None) -> None:
    """Refuse a file whose bytes are not those that were written.

    Args:
        checksums: None in a store of an early version, of which nothing is known.

    Raises:
        StoreError: it is damaged, or not listed.
    """
    if checksums is None:
        return
    expected = checksums.files.get(name)
    if expected is None:
        raise StoreError(f"{path / name} is not listed in {CHECKSUMS}. Put both back from a copy.")
    if hashlib.sha256(content).hexdigest() != expected:
        raise StoreError(
            f"{path / name} is damaged: its sha256 is not the one in {CHECKSUMS}. Put it back from "
            "a copy; semroute verify lists all damage."
        )


def read_checked(
    path: Path, name: str, checksums: Checksums | None, limit: int = MAX_BYTES
) -> pa.Buffer:
    """A file that is written once; a local one is mapped.

    Args:
        limit: largest size, in bytes.

    Raises:
        StoreError: it is missing, damaged, or larger.
    """
    file = inside(path, name)
    try:
        if is_local(file):
            content = _map(file, limit)
        else:
            content = pa.py_buffer(read_file(file, limit=limit))
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    check_digest(path, name, content, checksums)
    return content


def _map(path: Path, limit: int) -> pa.Buffer:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise StoreError(f"{path} has {size:,} bytes; expected at most {limit:,}")
        return pa.py_buffer(mmap(file.fileno(), 0, access=ACCESS_READ) if size else b"")


def refuse_faults(place: Path, faults: Iterable[str]) -> None:
    """Raise an error with the first faults of a file; do nothing if there are none.

    Raises:
        StoreError: there are some.
    """
    found = [one_line(fault) for fault in islice(faults, _SHOWN)]
    if found:
        raise StoreError(
            f"{place} cannot be used: {'; '.join(found)}. Put it back from a copy, or get the "
            "store again."
        )


GROUP_ROWS = 65_536
"""Rows of a group of a table, of which a reader looks at one at a time."""


def render_table(table: pa.Table | pa.RecordBatchReader) -> bytes:
    """A table as the bytes of its Parquet file.

    Of a reader only the rows of a row group are held; the bytes are the same.
    """
    sink = BytesIO()  # whose bytes are not copied in the end
    if isinstance(table, pa.Table):
        pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=GROUP_ROWS)
        return sink.getvalue()
    with pyarrow.parquet.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        group: list[pa.RecordBatch] = []
        for batch in table:
            group.append(batch)
            if sum(map(len, group)) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_batches(group), GROUP_ROWS)
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group), GROUP_ROWS)
    return sink.getvalue()


def samples_schema(samples: pa.Table) -> pa.Schema:
    """The schema of a table of samples of captions, with the further columns that it has."""
    extra = [field for field in SAMPLES_EXTRA if field.name in samples.column_names]
    return pa.schema([*SAMPLES_SCHEMA, *extra])


def read_contract(path: Path, kind: type[C]) -> C:
    return parse_contract(path, read_file(path, limit=MAX_BYTES), kind)


def parse_contract(path: Path, content: bytes, kind: type[C]) -> C:
    try:
        return parse(kind, load_json(content, str(path)), str(path))
    except ValueError as error:
        raise StoreError(f"{error}. semroute verify shows what can be done.") from error


def read_budget(path: Path) -> StoreBudget | None:
    """The document of a store's budget; None if there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return read_contract(path / BUDGET, StoreBudget)
    except FileNotFoundError:
        return None


def write_contract(path: Path, contract: Contract, *, early: bool = False) -> None:
    """Write a document; ``early`` as for :func:`semroute.schemas.digest`."""
    write_document(path, render(contract, early=early))


def digest_file(path: Path) -> str:
    """sha256 of a file."""
    with open_file(path) if is_local(path) else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
