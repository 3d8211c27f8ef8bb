"""Files that must stay as they were while they are read: a mapped file that is cut off ends the
process with SIGBUS, and one that is overwritten gives other rows."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ....schemas import InputError

_THREADS = 16
_MANY = 1_024
"""Files from which on their states are taken by several threads: over a network each takes a round
trip."""


class ChangedError(InputError):
    """A file is not the one that was opened."""


State = tuple[int, int, int, int, int]
"""Size, time of the last change of the bytes; device, number, time of the last change of the names:
a hard link changes the last alone, a copy with the same times the last three."""


class FileWatch:
    """States of files of this machine by number, compared whenever they are read.

    Args:
        path_of: number -> the file.
    """

    def __init__(self, path_of: Callable[[int], Path]) -> None:
        self._path_of = path_of
        self._files: dict[int, tuple[str, State]] = {}

    def start(self, numbers: Iterable[int]) -> None:
        """Take the states of files that will be read later; those that are missing are not yet
        written."""
        new = [number for number in numbers if number not in self._files]
        paths = [os.fspath(self._path_of(number)) for number in new]
        if len(paths) < _MANY:
            found = [*map(_state, paths)]
        else:
            with ThreadPoolExecutor(_THREADS) as pool:
                found = [*pool.map(_state, paths)]
        for number, path, state in zip(new, paths, found, strict=True):
            if state is not None:
                self._files[number] = path, state

    def forget(self, number: int) -> None:
        """Watch a file no longer; it may be removed, and be another one when it is read again."""
        self._files.pop(number, None)

    def check(self, numbers: Iterable[int]) -> list[int]:
        """Refuse files that have changed; those that are new are taken as they are.

        Returns:
            Those that lie under another name or number than before, though their size and times
            are the same: what was found out about their bytes has to be found out again.

        Raises:
            ChangedError: with the file's name.
        """
        renamed = []
        for number in numbers:
            known = self._files.get(number)
            if known is None:
                self.start([number])
                continue
            path, before = known
            now = _state(path)
            if now == before:
                continue
            if now is None:
                raise ChangedError(f"{path} is gone: its store was moved or removed meanwhile")
            if now[:2] != before[:2]:
                raise ChangedError(
                    f"{path} has changed since it was opened: it has {now[0]:,} bytes, and had "
                    f"{before[0]:,}. Nothing may write to a store that is read; check it with "
                    "semroute verify, then resume"
                )
            renamed.append(number)
            self._files[number] = path, now
        return renamed


def _state(path: str) -> State | None:
    """The state now; None if there is no such file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ChangedError(f"{path} cannot be read any more: {error}") from error
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino, found.st_ctime_ns
