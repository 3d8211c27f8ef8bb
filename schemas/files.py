"""Files of a store, in a local folder or as objects behind a URL that fsspec knows.

An object is put by one request, and is there whole or not at all; a file system achieves the same
by renaming. Listings are never taken from a cache, since other processes write too.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PosixPath
from typing import Any

from .atomic import write_whole
from .errors import InputError

_TIMES = ("mtime", "LastModified", "last_modified", "created")
"""Names that file systems of fsspec give to the time of the last change."""


class StorageError(InputError):
    """A place that cannot be reached or written to."""


@dataclass(frozen=True)
class Entry:
    """A file in a listing: size, and time of the last change in seconds since 1970 by the clock of
    the file system, 0 if that is unknown."""

    num_bytes: int
    changed: float


def locate(path: str | os.PathLike[str]) -> Path:
    """A local path, or one behind a URL, which has those methods of a Path that stores use.

    Raises:
        StorageError: no such kind of URL, or its package is not installed.
    """
    text = str(path)
    if text.startswith(("file://", "local://")):
        return Path(text.partition("://")[2])
    if "://" not in text:
        return Path(path)
    from upath import UPath

    try:
        found: Any = UPath(text.rstrip("/"), use_listings_cache=False)
        _ = found.fs  # created on first access, which imports the package that it needs
    except (ValueError, ImportError) as error:
        raise StorageError(f"{path}: {error}") from error
    return found


def is_local(path: Path) -> bool:
    """True if a path is in a file system of this machine."""
    return isinstance(path, PosixPath)


def list_names(folder: Path) -> set[str]:
    """Names of files and folders directly in a folder; none if there is no such folder."""
    if is_local(folder):
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    system, base = _system(folder)
    try:
        found = [path.rstrip("/") for path in system.ls(base, detail=False)]
    except FileNotFoundError:
        return set()
    return {path[len(base) + 1 :] for path in found if path != base}


def list_files(root: Path, folder: str = "") -> dict[str, Entry]:
    """All files under a folder of ``root``, by path relative to ``root``, sorted; none if there is
    no such folder."""
    if is_local(root):
        paths = (path for path in (root / folder).rglob("*") if path.is_file())
        stats = {str(path.relative_to(root)): path.stat() for path in paths}
        return {name: Entry(s.st_size, s.st_mtime) for name, s in sorted(stats.items())}
    system, base = _system(root)
    found = system.find(f"{base}/{folder}" if folder else base, detail=True)
    # A key that ends in a slash is how some tools mark an empty folder.
    names = {path[len(base) + 1 :]: info for path, info in sorted(found.items()) if path[-1] != "/"}
    return {name: Entry(int(info["size"] or 0), _changed(info)) for name, info in names.items()}


def read_file(path: Path) -> bytes:
    """The content of a file; an object is read by one request, so that it is of one moment.

    Raises:
        OSError: no such file, or it cannot be read.
    """
    if is_local(path):
        return path.read_bytes()
    system, base = _system(path)
    return bytes(system.cat_file(base))


def read_files(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of files, by path relative to ``root``; objects are read concurrently.

    Raises:
        OSError: one is missing, or cannot be read.
    """
    names = list(names)
    if is_local(root) or not names:
        return {name: (root / name).read_bytes() for name in names}
    system, base = _system(root)
    paths = {f"{base}/{name}": name for name in names}
    found = system.cat(list(paths), on_error="raise")
    return {name: bytes(found[path]) for path, name in paths.items()}


def read_ranges(
    paths: Sequence[Path], starts: Sequence[int], stops: Sequence[int | None]
) -> list[bytes]:
    """Parts of objects in one object store, read concurrently.

    Args:
        starts: first byte; a negative one counts from the end.
        stops: the byte after the last one; None: the end.

    Raises:
        OSError: one is missing, or cannot be read.
    """
    if not paths:
        return []
    names = [_system(path)[1] for path in paths]
    found = _system(paths[0])[0].cat_ranges(names, list(starts), list(stops))
    for part in found:
        if isinstance(part, BaseException):
            raise part
    return [bytes(part) for part in found]


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Write whole files, by path relative to ``root``; objects are written concurrently."""
    if is_local(root):
        for name, content in files.items():
            write_whole(root / name, content)
    elif files:
        system, base = _system(root)
        system.pipe({f"{base}/{name}": content for name, content in files.items()})


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its contents, if it exists."""
    if not is_local(path):
        system, base = _system(path)
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            system.rm(base, recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def create_object(path: Path, content: bytes) -> bool:
    """Put an object if there is none yet; returns whether it was put.

    This is one request where the store supports it (S3 by If-None-Match, Google Cloud by the
    generation, Azure by the ETag); elsewhere in fsspec it is two, between which another process may
    put one.
    """
    system, base = _system(path)
    try:
        system.pipe_file(base, content, mode="create")
    except FileExistsError:
        return False
    return True


def _system(path: Any) -> tuple[Any, str]:
    """The file system of a URL, and the path in its own notation."""
    return path.fs, str(path.path).rstrip("/")


def _changed(info: Mapping[str, Any]) -> float:
    value = next((info[key] for key in _TIMES if info.get(key) is not None), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)
