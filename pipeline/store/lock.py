"""One driver a store, or a run: a file that says who writes, and that it lives.

On a file system the file is linked into its place, and touched to show life. In an object store it
is put where there is none yet, and put again, with another number of beats. An object cannot be
renamed, so to take over the lock of a driver that died is to remove it and to put one's own: of two
that do so at once, each may have removed the other's. Every driver therefore looks for its own file
before it beats, and stops where another's is; and after a take-over it waits for a beat before it
begins.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...schemas import LOCK_FILE, InputError, LockOwner, render, write_document
from ...schemas.files import StorageError, create_object, is_local, read_file, remove

BEAT_SECONDS = 5.0
"""How often a driver shows that it lives."""
WATCH_BEATS = 4
"""Beats to watch before a driver of another machine is taken for dead. What is watched is whether
the file changes, so that clocks need not agree."""


class LockedError(InputError):
    """Another driver is at work."""


@dataclass
class Lock:
    """The lock that this process holds.

    Attributes:
        lost: another driver took this one for dead, and its lock.
        stop: set when that was seen.
    """

    lost: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def locked(store: Path, report: Callable[[str], None], hint: str = "") -> Iterator[Lock]:
    """Be the only driver of a folder; the file of one that died is replaced.

    Args:
        store: a store's, or a run's.
        hint: what to tell besides, where another is at work.

    Raises:
        LockedError: another driver is at work.
        StorageError: the store is behind a URL that cannot be written to.
    """
    path, local = store / LOCK_FILE, is_local(store)
    is_new = local and not store.exists()
    if local:
        try:
            store.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"{store} is a file; expected a new folder") from error
    else:
        _check_kind(store)
    own = LockOwner(
        host=socket.gethostname(),
        pid=os.getpid(),
        begun=_begun(os.getpid()),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )
    _take(path, own, report, hint)
    lock, end = Lock(), threading.Event()

    def beat() -> None:
        beats = 0
        while not end.wait(BEAT_SECONDS):
            # The disk is full, the network is down or the store is gone: others will say so.
            with suppress(Exception):
                found = _read(path)
                if found is None or found.token != own.token:
                    lock.lost = True
                    lock.stop.set()
                    return
                beats += 1
                _show_life(path, own.model_copy(update={"beats": beats}))

    thread = threading.Thread(target=beat, daemon=True, name="semroute-lock")
    thread.start()
    try:
        yield lock
    finally:
        end.set()
        thread.join()
        with suppress(OSError):
            found = read_driver(store)
            if found is not None and found.token == own.token:
                remove(path)
        if is_new and not any(store.iterdir()):
            store.rmdir()


def read_driver(store: Path) -> LockOwner | None:
    """Who writes to a store, or died while doing so."""
    return _read(store / LOCK_FILE)


def is_dead(driver: LockOwner) -> bool | None:
    """Whether a driver of this machine is gone; None for one of another."""
    if driver.host != socket.gethostname():
        return None
    return _begun(driver.pid) != driver.begun


def _read(path: Path) -> LockOwner | None:
    try:
        return LockOwner.model_validate(json.loads(read_file(path).decode("utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # as a ValidationError is
        return None


def _check_kind(store: Any) -> None:
    if store.protocol == "hf":
        raise StorageError(
            f"{store}: every file would be a commit to the Hub. Name another place, and take the "
            "finished store to the Hub with semroute push."
        )


def _show_life(path: Path, own: LockOwner) -> None:
    if is_local(path):
        os.utime(path)
    else:
        write_document(path, render(own))


def _sign(path: Path) -> Any:
    """What changes while a driver lives."""
    return path.stat().st_mtime_ns if is_local(path) else read_file(path)


def _create(path: Path, own: LockOwner) -> bool:
    """Put the file where there is none: whether it was put."""
    if not is_local(path):
        try:
            return create_object(path, render(own).encode())
        except Exception as error:  # no rights, no network: each package of fsspec has its own
            raise StorageError(
                f"{path.parent} cannot be written to: {type(error).__name__}: {error}"
            ) from error
    # Linked, not opened: whoever sees the file sees all of it.
    aside = _aside(path, own)
    aside.write_text(render(own), "utf-8")
    try:
        _link(aside, path)
        return True
    except FileExistsError:
        return False
    finally:
        aside.unlink()


def _aside(path: Path, own: LockOwner) -> Path:
    return path.with_name(f"{LOCK_FILE}.{own.token}")


def _link(file: Path, path: Path) -> None:
    """Make a file appear whole, unless there is one."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        with path.open("x", encoding="utf-8") as target:
            target.write(file.read_text("utf-8"))


def _take(path: Path, own: LockOwner, report: Callable[[str], None], hint: str) -> None:
    taken_over = False
    while not _create(path, own):
        found = _read(path)
        if found is not None and not _is_gone(path, found, report):
            raise _held(path, found, hint)
        who = "a driver" if found is None else f"process {found.pid} on {found.host}"
        report(f"the lock of {who}, which is gone, is taken over")
        taken_over = True
        if not is_local(path):
            if _read(path) == found:
                remove(path)
            continue
        # Renamed, not deleted: of two that take it over, one finds that it is no longer there.
        aside = _aside(path, own)
        with suppress(FileNotFoundError):
            path.rename(aside)
            if _read(aside) != found:  # the other was quicker: this is its own
                with suppress(FileExistsError):
                    _link(aside, path)
            aside.unlink()
    if taken_over and not is_local(path):
        time.sleep(BEAT_SECONDS)
        found = _read(path)
        if found is not None and found.token != own.token:
            raise _held(path, found, hint)


def _held(path: Path, found: LockOwner, hint: str) -> LockedError:
    return LockedError(
        f"{path.parent} is being written by process {found.pid} on {found.host}, since "
        f"{found.started}. Wait for it, or stop it.{hint}"
    )


def _is_gone(path: Path, found: LockOwner, report: Callable[[str], None]) -> bool:
    dead = is_dead(found)
    if dead is not None:
        return dead
    seconds = WATCH_BEATS * BEAT_SECONDS
    report(
        f"{path} is of process {found.pid} on {found.host}; watching for {seconds:.0f} s whether "
        "it is alive"
    )
    try:
        before = _sign(path)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, BEAT_SECONDS))
            if _sign(path) != before:
                return False
    except FileNotFoundError:
        return True
    return True


def _begun(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot; empty where there is none.

    With the pid it names a process for good: pids are used again. /proc/PID/stat, field 22.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
