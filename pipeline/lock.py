"""One driver a store: a file that says who writes, and that it lives."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PosixPath

from ..schemas import DRIVER, Driver, InputError, render

BEAT_SECONDS = 5.0
"""How often a driver touches its file."""
WATCH_BEATS = 4
"""Beats to watch before a driver of another machine is taken for dead. What is watched is whether
the file changes, so that clocks need not agree."""


class LockedError(InputError):
    """Another driver is at work on the store."""


@contextmanager
def locked(store: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Be the only driver of a store; the file of one that died is replaced.

    A store behind a URL is not locked.

    Raises:
        LockedError: another driver is at work.
    """
    if not isinstance(store, PosixPath):
        yield
        return
    path = store / DRIVER
    is_new = not store.exists()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{store} is a file; expected a new folder") from error
    own = Driver(
        host=socket.gethostname(),
        pid=os.getpid(),
        begun=_begun(os.getpid()),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )
    _take(path, own, report)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                os.utime(path)
            except OSError:  # the disk is full or the store is gone: others will say so
                continue

    thread = threading.Thread(target=beat, daemon=True, name="semroute-lock")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found = read_driver(store)
        if found is not None and found.token == own.token:
            path.unlink(missing_ok=True)
        if is_new and not any(store.iterdir()):
            store.rmdir()


def read_driver(store: Path) -> Driver | None:
    """Who writes to a store, or died while doing so."""
    return _read(store / DRIVER)


def is_dead(driver: Driver) -> bool | None:
    """Whether a driver of this machine is gone; None for one of another."""
    if driver.host != socket.gethostname():
        return None
    return _begun(driver.pid) != driver.begun


def _read(path: Path) -> Driver | None:
    try:
        return Driver.model_validate(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):  # a ValidationError is a ValueError
        return None


def _link(file: Path, path: Path) -> None:
    """Make a file appear whole, unless there is one."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        with path.open("x", encoding="utf-8") as target:
            target.write(file.read_text("utf-8"))


def _take(path: Path, own: Driver, report: Callable[[str], None]) -> None:
    aside = path.with_name(f"{DRIVER}.{own.token}")
    while True:
        # Linked, not opened: whoever sees the file sees all of it.
        aside.write_text(render(own), "utf-8")
        try:
            _link(aside, path)
            return
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        found = read_driver(path.parent)
        if found is not None and not _is_gone(path, found, report):
            raise LockedError(
                f"{path.parent} is being written by process {found.pid} on {found.host}, since "
                f"{found.started}. Wait for it, or stop it; semroute status {path.parent} shows it."
            )
        who = "a driver" if found is None else f"process {found.pid} on {found.host}"
        report(f"the lock of {who}, which is gone, is taken over")
        # Renamed, not deleted: of two that take it over, one finds that it is no longer there.
        with suppress(FileNotFoundError):
            path.rename(aside)
            if _read(aside) != found:  # the other was quicker: this is its own
                with suppress(FileExistsError):
                    _link(aside, path)


def _is_gone(path: Path, found: Driver, report: Callable[[str], None]) -> bool:
    dead = is_dead(found)
    if dead is not None:
        return dead
    seconds = WATCH_BEATS * BEAT_SECONDS
    report(
        f"{path} is of process {found.pid} on {found.host}; watching for {seconds:.0f} s whether "
        "it is alive"
    )
    try:
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, BEAT_SECONDS))
            if path.stat().st_mtime_ns != before:
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
