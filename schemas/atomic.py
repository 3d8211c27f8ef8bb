"""Files that are there whole or not at all, whatever dies while they are written."""

import os
import uuid
from pathlib import Path, PosixPath
from typing import Any

PARTIAL = ".partial"
"""Ends the name of what one of several writers has not put in its place yet, or never will."""


def write_document(path: Path, text: str) -> None:
    """As :func:`write_whole`, a text in UTF-8."""
    write_whole(path, text.encode())


def write_whole(path: Any, *content: bytes, alone: bool = True) -> None:
    """Write a file beside its place, then put it there; the folder is made where missing.

    Behind a URL (``upath.UPath``) it is one put, which is there whole or not at all.

    Args:
        content: one part after the other.
        alone: nobody else writes this file at the same time.
    """
    if not isinstance(path, PosixPath):
        path.fs.pipe_file(path.path, b"".join(content))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = ".tmp" if alone else f".{uuid.uuid4().hex}{PARTIAL}"
    unfinished = path.with_name(path.name + suffix)
    try:
        with unfinished.open("wb") as file:
            file.writelines(content)
        publish(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


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
