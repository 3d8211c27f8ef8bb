"""Files that are there whole or not at all, whatever dies while they are written."""

import os
from pathlib import Path, PosixPath
from typing import Any


def write_document(path: Path, text: str) -> None:
    """As :func:`write_whole`, a text in UTF-8."""
    write_whole(path, text.encode())


def write_whole(path: Any, content: bytes) -> None:
    """Write a file beside its place, then put it there; the folder is made where missing.

    Behind a URL (``upath.UPath``) it is one put, which is there whole or not at all.
    """
    if not isinstance(path, PosixPath):
        path.fs.pipe_file(path.path, content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    publish(unfinished, path)


def publish(unfinished: Path, path: Path) -> None:
    """Rename a file when its bytes are on disk, and have the new name on disk too.

    An object is put once more under its name, and not removed.
    """
    if not isinstance(path, PosixPath):
        write_whole(path, unfinished.read_bytes())
        return
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
