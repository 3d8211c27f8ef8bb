"""Atomic writes: a file or folder is there whole or not at all, even if its writer dies."""

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import Any, BinaryIO

from .errors import InputError

PARTIAL = ".partial"
"""Suffix of a file that one of several writers has not finished."""
_UNFINISHED, _REPLACED = "unfinished", "replaced"


def write_document(path: Path, text: str) -> None:
    """Write a text in UTF-8 with :func:`write_whole`."""
    write_whole(path, text.encode())


def write_whole(path: Any, *content: bytes, alone: bool = True) -> None:
    """Write a file under a temporary name, then rename it; its folder is created if missing.

    Behind a URL (``upath.UPath``) it is one put, which is atomic.

    Args:
        content: parts of the file, in order.
        alone: no other process writes this file at the same time.
    """
    if not isinstance(path, PosixPath):
        path.fs.pipe_file(path.path, b"".join(content))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".tmp" if alone else f".{uuid.uuid4().hex}{PARTIAL}"
    unfinished = path.with_name(path.name + suffix)
    try:
        with _create(unfinished) as file:
            file.writelines(content)
        publish(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Refuse a file or folder that could not be written, before the work whose result it is to
    hold. Nothing is created.

    Raises:
        OSError: the nearest folder that is there may not be written, or a file is in its place.
    """
    if not isinstance(path, PosixPath):
        return
    folder = path if path.is_dir() else path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    number = 0
    if not folder.is_dir():
        number = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise OSError(number, os.strerror(number), str(folder))


def make_folder(parent: Path, prefix: str) -> Path:
    """A new folder of a name that nobody has, with the permissions that the umask allows."""
    folder = parent / f"{prefix}{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    return folder


def _create(path: Path) -> BinaryIO:
    """A new file; one that a killed writer left there goes first, as does a link."""
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def publish(unfinished: Path, path: Path) -> None:
    """Flush a file to disk, then rename it, and flush the new name too.

    An object is put again under its final name; the first one is not removed.
    """
    if not isinstance(path, PosixPath):
        write_whole(path, unfinished.read_bytes())
        return
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush the bytes of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(out: str | os.PathLike[str], own: Collection[str] = ()) -> Iterator[Path]:
    """Write a folder beside its place, and put it there when it is complete.

    What a killed writer left beside it goes first, so that the same command does it again.

    Args:
        own: files that may be in the folder already; it is replaced.

    Yields:
        A new folder, to be filled.

    Raises:
        InputError: there are other files, or no folder.
    """
    final = Path(out).resolve()
    unfinished, replaced = (
        final.with_name(f".{final.name}.{suffix}") for suffix in (_UNFINISHED, _REPLACED)
    )
    if replaced.is_dir() and not final.exists():  # killed between the two names
        replaced.rename(final)
    if final.exists() and not final.is_dir():
        raise InputError(f"{out} is a file: name a new folder")
    if final.exists() and not {*os.listdir(final)} <= {*own}:
        raise InputError(f"{out} is not empty: name a new folder")
    for left in (unfinished, replaced):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            sync(path)
        if final.exists() and any(final.iterdir()):
            final.rename(replaced)
        unfinished.rename(final)
        sync(final.parent)
    finally:
        for left in (unfinished, replaced):
            shutil.rmtree(left, ignore_errors=True)
