"""The JSON files and tables of a store, read, written and staged."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from ...schemas import (
    LOCK_FILE,
    Checksums,
    Contract,
    FeatureManifest,
    InputError,
    LatentManifest,
    digest,
    parse,
    publish,
    render,
    write_document,
)
from ...schemas.files import StorageError, is_local, list_files, read_file, remove

C = TypeVar("C", bound=Contract)
MANIFEST = "manifest.json"
CHECKSUMS = "checksums.json"
GROWING = "growing"
"""Folder of what a store will be once it has grown: staged here whole, then put in its place."""
_SHARD_FILE = re.compile(r"/shard-(\d{6,})\.json$")


class StoreError(InputError):
    """A store is not there, not finished, or not the one that is needed."""


def read_manifest(path: Path, kind: str) -> Any:
    """The document that a store's manifest holds, whatever kind of store it is.

    Raises:
        StoreError: there is none, or it is damaged.
        PlaceError: the place cannot be read.
    """
    try:
        return json.loads(read_file(path / MANIFEST).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path} is no {kind} store: it has no {MANIFEST}") from error
    except ValueError as error:  # no JSON, or no text
        raise StoreError(f"{path / MANIFEST} is damaged: {error}") from error
    except Exception as error:  # no rights, no network: each package of fsspec has its own
        if is_local(path):
            raise
        raise StorageError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def render_table(table: pa.Table) -> bytes:
    """A table as the bytes of its Parquet file."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def write_manifest(path: Path, manifest: FeatureManifest | LatentManifest) -> None:
    """The manifest, without which there is no store; before it the checksums of all else."""
    names = [name for name in list_files(path) if name != LOCK_FILE]
    checksums = {name: digest_file(path / name) for name in names}
    write_contract(path / CHECKSUMS, Checksums(manifest=digest(manifest), files=checksums))
    write_contract(path / MANIFEST, manifest)


def commit(path: Path) -> None:
    """Put what is staged in its place, the manifest last; drop it where it was not decided."""
    staged = path / GROWING
    names = list_files(staged)
    if MANIFEST in names:
        for name in sorted(names, key=lambda name: name == MANIFEST):
            publish(staged / name, path / name)
    remove(staged)


def read_contract(path: Path, kind: type[C]) -> C:
    return parse_contract(path, read_file(path), kind)


def parse_contract(path: Path, content: bytes, kind: type[C]) -> C:
    try:
        return parse(kind, json.loads(content.decode("utf-8")), str(path))
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged: {error}. semroute verify says what can be done."
        ) from error


def shard_of(name: str) -> int | None:
    """Which shard a receipt or a quarantine is about, by its file's name; None for other files."""
    found = _SHARD_FILE.search(name)
    return int(found[1]) if found else None


def digest_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_contract(path: Path, contract: Contract) -> None:
    write_document(path, render(contract))
