"""Files of tensors, by safetensors."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .files import open_file

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system with which safetensors cannot write, as such.

    Raises:
        OSError: what is written at ``path`` cannot be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # Only the text has the error number, such as that of a full disk.
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def save_tensors(
    tensors: Mapping[str, "Tensor"], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors into a file that others may read as the umask allows.

    Args:
        metadata: texts in the header of the file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    path.open("ab").close()
    mode = path.stat().st_mode
    with system_errors(path):
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode & 0o777)  # safetensors makes it private


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A file of tensors, of which only what is asked for is read.

    Raises:
        InputError: it is damaged, or no plain file.
        OSError: no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    open_file(path, follow=True).close()  # safetensors would wait for a pipe
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """All tensors of a file, by name; see :func:`open_tensors`."""
    with open_tensors(path) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def make_readable(folder: Path) -> None:
    """Let others read the files of a new folder as the umask allows, whoever wrote them there."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
