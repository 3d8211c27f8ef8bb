"""Files of a store, in a local folder or as objects behind a URL that fsspec knows.

An object is put by one request, and is there whole or not at all; a file system achieves the same
by renaming. Listings are never taken from a cache, since other processes write too.

A store may come from a stranger: it holds plain files and folders. Links, pipes and devices in it
are refused, and names that lead out of it.
"""

import errno
import os
import re
import resource
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from io import BufferedReader
from pathlib import Path, PosixPath
from typing import Any, cast

from .atomic import write_whole
from .errors import InputError

_TIMES = ("mtime", "LastModified", "last_modified", "created")
"""Names that file systems of fsspec give to the time of the last change."""


MAX_DEPTH = 16
"""Deepest nesting of folders in a store."""
_LINK = "a link"
_UNNAMEABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls; bytes that are not UTF-8
_KINDS = {
    **{stat.S_IFLNK: _LINK, stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"},
    **{stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"},
}
_REMEDIES = {
    _LINK: "expected the file itself: copy the store without links, as `hf download` does with "
    "--local-dir",
    "a folder": "expected a file",
}


_OTHER_FILES = 512
"""Open files that a process has or will have beside those of stores."""
_HTTP = "aiohttp"
"""Package by which fsspec reads over HTTP."""


class StorageError(InputError):
    """A place that cannot be reached or written to."""


@dataclass(frozen=True)
class Entry:
    """A file in a listing: size, and time of the last change in seconds since 1970 by the clock of
    the file system, 0 if that is unknown."""

    num_bytes: int
    changed: float


@dataclass(frozen=True)
class Listing:
    """All that is under a folder, by path relative to the root.

    Attributes:
        files: plain files, sorted.
        others: what is neither a plain file nor a folder -> what it is, for messages.
    """

    files: dict[str, Entry]
    others: dict[str, str]


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


@lru_cache(maxsize=256)
def on_fuse(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a path is in a file system that a program provides (FUSE), as mounted buckets are.

    The kernel takes about a dozen requests to read ahead from it and drops the others, so that each
    page of a mapped file may become a request of its own.

    Args:
        mounts: the mounts of this process; see proc(5).
    """
    if not is_local(path) or not mounts.exists():
        return False
    place, longest, kind = os.path.realpath(path), -1, ""
    for line in mounts.read_text("utf-8", "surrogateescape").splitlines():
        fields = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
        if (place + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= longest:
            longest, kind = len(mount), fields[fields.index("-") + 1]
    return kind == "virtiofs" or kind.startswith("fuse")


@contextmanager
def reaching(place: Path | str) -> Iterator[None]:
    """Names a place behind a URL in what the package that reaches it raises: no credentials, no
    network. Each package of fsspec has errors of its own.

    Raises:
        StorageError: instead of such an error. Others pass: those of the operating system, which
            say that nothing is there, and bugs.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        failure = error
        if isinstance(error, FileNotFoundError) and not _is_missing(error):
            failure = cast("Exception", error.__cause__)
        package = type(failure).__module__.partition(".")[0]
        passes = isinstance(failure, OSError) and package != _HTTP
        if passes or package == "builtins" or "://" not in str(place):
            raise
        kind = type(failure).__name__
        raise StorageError(f"{place} cannot be read: {kind}: {failure}") from error


def _is_missing(error: FileNotFoundError) -> bool:
    """Whether a place said that nothing is there: to fsspec a file is missing whenever a request
    over HTTP failed. A bucket that may not be listed answers 403 for what is not there."""
    cause = error.__cause__
    if cause is None or type(cause).__module__.partition(".")[0] != _HTTP:
        return True
    return _status(error) in (403, 404, 410)


def answer(error: BaseException) -> str:
    """What a server answered for a missing file, to be put behind that message; may be empty."""
    status = _status(error)
    return "" if status in (None, 404) else f" (the server answers {status})"


def _status(error: BaseException) -> int | None:
    return getattr(error.__cause__, "status", None)


def list_names(folder: Path) -> set[str]:
    """Names of files and folders directly in a folder; none if there is no such folder."""
    if is_local(folder):
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    try:
        with reaching(folder):
            system, base = _system(folder)
            found = [path.rstrip("/") for path in system.ls(base, detail=False)]
    except FileNotFoundError:
        return set()
    return {path[len(base) + 1 :] for path in found if path != base}


def inside(root: Path, name: str) -> Path:
    """The path of a file in a store, which need not be there yet.

    Args:
        root: the store; it may be, or lie behind, a link.
        name: relative to it.

    Raises:
        StorageError: the name leads out of the store, or passes through a link; or what is there is
            neither a file nor a folder.
    """
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or _UNNAMEABLE.search(name):
        raise StorageError(f"{root}: {name!r} is no name of a file in a store")
    place = root / name
    if not is_local(root):
        return place
    path = str(root)
    for part in parts:
        path = f"{path}/{part}"
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            break  # a folder on the way is missing, which whoever reads the file reports
        except OSError as error:
            raise StorageError(f"{place} cannot be read: {error.strerror}") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise StorageError(_refusal(path, mode))
    return place


def _refusal(path: str | Path, mode: int) -> str:
    kind = _KINDS.get(stat.S_IFMT(mode), "no plain file")
    return f"{path} is {kind}; {_REMEDIES.get(kind, 'expected a plain file')}"


def scan(root: Path, folder: str = "") -> Listing:
    """All that is under a folder of ``root``; links are listed, never followed.

    Raises:
        StorageError: the folder itself lies behind a link in ``root``, or cannot be read.
    """
    if is_local(root):
        start = str(inside(root, folder) if folder else root)
        return _scan(start, f"{folder}/" if folder else "")
    with reaching(root):
        system, base = _system(root)
        found = system.find(f"{base}/{folder}" if folder else base, detail=True)
    # A key that ends in a slash is how some tools mark an empty folder.
    names = {path[len(base) + 1 :]: info for path, info in sorted(found.items()) if path[-1] != "/"}
    files = {name: Entry(int(info["size"] or 0), _changed(info)) for name, info in names.items()}
    return Listing(files, {})


def _scan(start: str, prefix: str) -> Listing:
    files: dict[str, Entry] = {}
    others: dict[str, str] = {}
    folders = [(start, prefix, 0)]
    while folders:
        folder, prefix, depth = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = prefix + entry.name
                    with suppress(FileNotFoundError):  # another process renamed it
                        status = entry.stat(follow_symlinks=False)
                        kind = stat.S_IFMT(status.st_mode)
                        if _UNNAMEABLE.search(entry.name):
                            others[ascii(name)] = "a name with control characters"
                        elif kind == stat.S_IFREG:
                            files[name] = Entry(status.st_size, status.st_mtime)
                        elif kind == stat.S_IFDIR and depth < MAX_DEPTH:
                            folders.append((entry.path, f"{name}/", depth + 1))
                        elif kind == stat.S_IFDIR:
                            others[name] = f"nested more than {MAX_DEPTH} deep"
                        else:
                            others[name] = _KINDS.get(kind, "no plain file")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise StorageError(f"{folder} cannot be read: {error.strerror}") from error
    return Listing(dict(sorted(files.items())), dict(sorted(others.items())))


def list_files(root: Path, folder: str = "") -> dict[str, Entry]:
    """All files under a folder of ``root``, by path relative to ``root``, sorted; none if there is
    no such folder.

    Raises:
        StorageError: something there is neither a file nor a folder; or it cannot be read.
    """
    found = scan(root, folder)
    for name, kind in found.others.items():
        raise StorageError(
            f"{root}/{name} is {kind}; {_REMEDIES.get(kind, 'a store holds plain files')}"
        )
    return found.files


def open_file(path: Path, *, follow: bool = False) -> BufferedReader:
    """A local file for reading, if it is a plain file.

    Args:
        follow: it may be a link to one.

    Raises:
        StorageError: it is something else.
        OSError: no such file, or it cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise StorageError(_refusal(path, os.lstat(path).st_mode)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise StorageError(_refusal(path, mode))
    return os.fdopen(descriptor, "rb")


def allow_open_files(num: int) -> None:
    """Raise this process's own limit of open files, 1,024 on many machines, so that it may have so
    many more; never above what the machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with suppress(ValueError, OSError):  # the kernel has a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def read_file(path: Path, *, limit: int | None = None, follow: bool = False) -> bytes:
    """The content of a file; an object is read by one request, so that it is of one moment.

    Args:
        limit: largest size, in bytes.
        follow: a local file may be a link to one.

    Raises:
        StorageError: it is larger, or no plain file; or the place of an object does not answer.
        OSError: no such file, or it cannot be read.
    """
    if is_local(path):
        with open_file(path, follow=follow) as file:
            _check_size(path, os.fstat(file.fileno()).st_size, limit)
            return file.read()
    with reaching(path):
        if limit is not None:
            _check_size(path, size_of(path), limit)
        system, base = _system(path)
        return bytes(system.cat_file(base))


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        OSError: no such file.
    """
    if is_local(path):
        return path.lstat().st_size
    with reaching(path):
        system, base = _system(path)
        return int(system.info(base)["size"] or 0)


def _check_size(path: Path, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise StorageError(f"{path} has {size:,} bytes; expected at most {limit:,}")


def read_files(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of files, by path relative to ``root``; objects are read concurrently.

    Raises:
        StorageError: one is no plain file in ``root``.
        OSError: one is missing, or cannot be read.
    """
    places = {name: inside(root, name) for name in names}
    if is_local(root) or not places:
        return {name: read_file(place) for name, place in places.items()}
    with reaching(root):
        system, base = _system(root)
        paths = {f"{base}/{name}": name for name in places}
        found = system.cat(list(paths), on_error="raise")
    return {name: bytes(found[path]) for path, name in paths.items()}


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Write whole files, by path relative to ``root``; objects are written concurrently."""
    if is_local(root):
        for name, content in files.items():
            write_whole(inside(root, name), content)
    elif files:
        system, base = _system(root)
        system.pipe({f"{base}/{name}": content for name, content in files.items()})


def remove(path: Path) -> None:
    """Remove a file, or a folder with all its contents, if it exists; of a link, the link."""
    if not is_local(path):
        system, base = _system(path)
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            system.rm(base, recursive=True)
    elif path.is_dir() and not path.is_symlink():
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
