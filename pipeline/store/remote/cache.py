"""A cache of chunks on a local disk, within a size, shared by the processes of a machine.

    FOLDER/
      semroute-cache.json    says that the folder is a cache, and that its files may be removed
      state                  bytes in use, and whether somebody is writing; locked by who writes
      NAME.chunks            a shard: its chunks at their own places, the rest without disk space
      NAME.held              one byte per chunk: 1 if it is there

Names are digests of the store, the shard and the version of its file, so what was written again is
another shard. Chunks carry their own checksums. A chunk is held once its byte is set, after its
content is written; the kernel frees the lock of a process that is killed, and whoever is next
counts the bytes in use again.
"""

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....schemas import InputError, write_whole
from ....schemas.files import StorageError, is_local, locate
from ....schemas.json_file import load_json, read_json

MARKER = "semroute-cache.json"
_MARKER_TEXT = '{"format": "semroute-cache", "version": 1}\n'
_STATE, _CHUNKS, _HELD = "state", ".chunks", ".held"
_STATE_FORM = struct.Struct("<QQ")
_PAGE = 4096
IDLE_SECONDS = 600.0
"""Time after which a shard that nobody reads makes room, where all shards are read all the time."""
_USED_SECONDS = 30.0
"""How often it is noted that a shard is in use."""
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class ShardKey:
    """A shard in the cache: 40 hexadecimal digits, and the number of its chunks."""

    name: str
    num_chunks: int


class ChunkCache:
    """Chunks on a local disk.

    Args:
        folder: an empty or new one, or one of another cache.
        max_bytes: that its files may take on disk.
        replace: let new chunks replace those of shards that were not used for longest. Otherwise
            they only replace shards that nobody has used for :data:`IDLE_SECONDS`: where every
            chunk is read once in an epoch, those that are there are worth as much as new ones.

    Attributes:
        fault: why nothing is written any more, for a warning; empty if all is well.

    Raises:
        InputError: the folder holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path, max_bytes: int, *, replace: bool = True) -> None:
        self.folder, self.max_bytes, self.replace = folder, max_bytes, replace
        self.fault = ""
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        try:
            self._prepare()
        except OSError as error:
            raise StorageError(f"data.cache.folder {folder}: {error}") from error
        self._recount = True
        with self._locked():
            pass

    def _prepare(self) -> None:
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MARKER).exists():
            write_whole(self.folder / MARKER, _MARKER_TEXT.encode(), alone=False)

    def read(self, key: ShardKey, ranges: Mapping[int, tuple[int, int]]) -> dict[int, np.ndarray]:
        """Those of some chunks that are held; their checksums are the caller's to compare.

        Args:
            ranges: number of a chunk in its shard -> its first byte and the byte after its last.
        """
        found = {}
        try:
            held = self.held(key)
            if not any(held[number] for number in ranges):
                return {}
            with self._open(key.name + _CHUNKS, os.O_RDONLY) as file:
                for number, (start, stop) in ranges.items():
                    if held[number]:
                        found[number] = np.frombuffer(os.pread(file, stop - start, start), np.uint8)
        except OSError:
            return {}
        if time.monotonic() - self._used.get(key.name, -_USED_SECONDS) >= _USED_SECONDS:
            self._used[key.name] = time.monotonic()
            with suppress(OSError):
                os.utime(self._path(key.name + _HELD), follow_symlinks=False)
        return found

    def drop(self, key: ShardKey, number: int) -> bool:
        """Forget a chunk that is damaged.

        Returns:
            Whether it was held; otherwise it made room meanwhile.
        """
        with suppress(OSError), self._locked():
            if self.held(key)[number]:
                with self._open(key.name + _HELD, os.O_RDWR) as file:
                    os.pwrite(file, b"\0", number)
                return True
        return False

    def write(self, key: ShardKey, chunks: Mapping[int, tuple[int, np.ndarray]]) -> int:
        """Hold chunks, as far as there is room.

        Args:
            chunks: number of a chunk in its shard -> its first byte there, and its bytes.

        Returns:
            Number of chunks that are not held.
        """
        if self.fault or not chunks:
            return len(chunks)
        try:
            with self._locked() as state:
                held = self.held(key)
                new = {number: each for number, each in chunks.items() if not held[number]}
                needed = sum(map(_space, new.values()))
                if not held.any():
                    needed += _PAGE + -(-key.num_chunks // _PAGE) * _PAGE
                if new and not self._make_room(state, needed, key.name):
                    return len(new)
                if new:
                    self._write(key, new)
                    state.num_bytes += needed
        except OSError as error:
            self.fault = (
                f"warning: the cache in {self.folder} cannot be written to: {error.strerror}. "
                "Training continues without what is not there yet"
            )
            return len(chunks)
        return 0

    def _write(self, key: ShardKey, chunks: Mapping[int, tuple[int, np.ndarray]]) -> None:
        create = os.O_RDWR | os.O_CREAT
        with self._open(key.name + _CHUNKS, create) as file:
            for start, content in chunks.values():
                view = memoryview(content.data)
                while view:
                    done = os.pwrite(file, view, start)
                    start, view = start + done, view[done:]
        with self._open(key.name + _HELD, create) as file:
            if os.fstat(file).st_size != key.num_chunks:
                os.ftruncate(file, key.num_chunks)
            for number in chunks:
                os.pwrite(file, b"\1", number)

    def held(self, key: ShardKey) -> np.ndarray:
        """Which chunks of a shard are held: bool ``[chunks]``."""
        held = b""
        with suppress(FileNotFoundError), self._open(key.name + _HELD, os.O_RDONLY) as file:
            held = os.pread(file, key.num_chunks, 0)
        return np.frombuffer(held.ljust(key.num_chunks, b"\0"), np.uint8) == 1

    def _make_room(self, state: "_State", needed: int, name: str) -> bool:
        """Remove shards until there is room for more bytes, if that is possible.

        Args:
            name: of the shard that gets them.
        """
        if state.num_bytes + needed <= self.max_bytes:
            return True
        state.num_bytes = self._count()
        if state.num_bytes + needed <= self.max_bytes:
            return True
        if needed > self.max_bytes:
            return False
        now, shards = time.time(), []
        for path in self.folder.glob(f"*{_HELD}"):
            changed = path.lstat().st_mtime
            if path.stem != name and (self.replace or changed < now - IDLE_SECONDS):
                shards.append((changed, path.stem))
        for _, each in sorted(shards):
            self._remove(each)
            state.num_bytes = self._count()
            if state.num_bytes + needed <= self.max_bytes:
                return True
        return False

    def _remove(self, name: str) -> None:
        for suffix in (_HELD, _CHUNKS):  # what is said to be held is there
            self._path(name + suffix).unlink(missing_ok=True)

    def _count(self) -> int:
        """Bytes on disk, after the leftovers of killed processes are removed."""
        total, found = 0, {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process's marker, renamed meanwhile
                    found[entry.name] = entry.stat(follow_symlinks=False)
        for name, status in found.items():
            stem, suffix = os.path.splitext(name)
            if suffix == _CHUNKS and stem + _HELD not in found:
                self._path(name).unlink(missing_ok=True)
            else:
                total += 512 * status.st_blocks
        return total

    @contextmanager
    def _locked(self) -> Iterator["_State"]:
        """The state, while no other thread or process writes."""
        with self._lock, self._open(_STATE, os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = os.pread(file, _STATE_FORM.size, 0)
            num_bytes, writing = (
                _STATE_FORM.unpack(content) if len(content) == _STATE_FORM.size else (0, 1)
            )
            state = _State(num_bytes)
            if writing or self._recount:  # by somebody who was killed
                state.num_bytes, self._recount = self._count(), False
            os.pwrite(file, _STATE_FORM.pack(state.num_bytes, 1), 0)
            try:
                yield state
            except OSError:
                self._recount = True
                raise
            os.pwrite(file, _STATE_FORM.pack(state.num_bytes, 0), 0)

    def _path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def _open(self, name: str, flags: int) -> Iterator[int]:
        """A file of the cache; links are not followed."""
        file = os.open(self._path(name), flags | _FLAGS, 0o666)
        try:
            yield file
        finally:
            os.close(file)


@dataclass
class _State:
    """Bytes in use, or more where neighbouring chunks share a block."""

    num_bytes: int


def _space(chunk: tuple[int, np.ndarray]) -> int:
    """Bytes on disk that a chunk takes at most, with one block for where it lies."""
    start, content = chunk
    first, last = start // _PAGE, -(-(start + len(content)) // _PAGE)
    return (last - first + 1) * _PAGE


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be that of a cache; it need not exist.

    Raises:
        InputError: it holds something else.
    """
    marker = folder / MARKER
    if marker.exists():
        found = read_json(marker)
        if found != load_json(_MARKER_TEXT, MARKER):
            raise InputError(f"{marker} is of another version: name another data.cache.folder")
    elif folder.exists() and any(not p.name.startswith(MARKER) for p in folder.iterdir()):
        raise InputError(
            f"{folder} is no cache and not empty, and files of a cache are removed at will: name "
            "a new folder for data.cache.folder"
        )


def cache_folder(folder: str) -> Path:
    """The folder of a cache, which need not exist.

    Raises:
        InputError: it is a URL, or holds something else.
    """
    path = locate(folder)
    if not is_local(path):
        raise InputError(
            f"data.cache.folder {folder}: expected a folder of this machine, not a URL"
        )
    try:
        check_folder(path)
    except OSError as error:
        raise StorageError(f"data.cache.folder {folder}: {error}") from error
    return path
