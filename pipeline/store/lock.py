"""One writer per store or run, its driver: a file that names it and shows that it is alive.

On a file system the file is linked into place, and touched to show life. In an object store it is
put if there is none yet, and put again with another number of beats. An object cannot be renamed,
so taking over the lock of a dead driver means removing its file and putting one's own: of two
drivers that do so at once, each may have removed the other's. Every driver therefore checks that
the file is its own before each beat, and stops if it is not; and after taking over, it waits for
one beat before it begins.
"""

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
from ...schemas.json_file import load_json

BEAT_SECONDS = 5.0
"""Seconds between signs of life of a driver."""
WATCH_BEATS = 4
"""Beats to watch before a driver on another machine is taken for dead. It is watched whether the
file changes, so clocks need not agree."""

_MAX_BYTES = 100_000  # of a lock file


class LockedError(InputError):
    """Another driver is writing."""


@dataclass
class Lock:
    """The lock that this process holds.

    Attributes:
        lost: another driver took this one for dead and has taken over its lock.
        stop: set as soon as this is noticed.
    """

    lost: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def locked(store: Path, report: Callable[[str], None], hint: str = "") -> Iterator[Lock]:
    """Be the only driver of a folder; the lock of a dead driver is taken over.

    Args:
        store: folder of a store or a run.
        report: takes one line of text at a time.
        hint: added to the message if another driver is writing.

    Raises:
        LockedError: another driver is writing.
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
        _check_writable(store)
    own = LockOwner(
        host=socket.gethostname(),
        pid=os.getpid(),
        begun=_start_ticks(os.getpid()),
        namespace=_namespace(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        token=uuid.uuid4().hex,
    )
    _acquire(path, own, report, hint)
    lock, end = Lock(), threading.Event()

    def beat() -> None:
        beats = 0
        while not end.wait(BEAT_SECONDS):
            # A full disk, a network that is down or a removed store is reported elsewhere.
            with suppress(Exception):
                owner = _read(path)
                if owner is None or owner.token != own.token:
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
            owner = read_driver(store)
            if owner is not None and owner.token == own.token:
                remove(path)
        if is_new and store.exists() and not any(store.iterdir()):
            store.rmdir()


def read_driver(store: Path) -> LockOwner | None:
    """The driver that writes to a store, or died while doing so; None if there is none."""
    return _read(store / LOCK_FILE)


def is_dead(driver: LockOwner) -> bool | None:
    """True if a driver has ended, False if not; None if that cannot be seen from here: it is on
    another machine or in another container, or processes of its user are hidden."""
    if driver.host != socket.gethostname() or driver.namespace != _namespace():
        return None
    ticks = _start_ticks(driver.pid)
    if ticks:
        return ticks != driver.begun
    try:
        os.kill(driver.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return None


def _read(path: Path) -> LockOwner | None:
    try:
        content = read_file(path, limit=_MAX_BYTES if is_local(path) else None)
        return LockOwner.model_validate(load_json(content, str(path)))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # as a ValidationError is
        return None


def _check_writable(store: Any) -> None:
    if store.protocol == "hf":
        raise StorageError(
            f"{store}: every file would be a commit to the Hub. Name another place, and upload the "
            "finished store with semroute push."
        )


def _show_life(path: Path, own: LockOwner) -> None:
    if is_local(path):
        os.utime(path, follow_symlinks=False)
    else:
        write_document(path, render(own))


def _life_sign(path: Path) -> Any:
    """A value that changes while the driver is alive."""
    return path.stat().st_mtime_ns if is_local(path) else read_file(path)


def _create(path: Path, own: LockOwner) -> bool:
    """Put the file if there is none; returns whether it was put."""
    if not is_local(path):
        try:
            return create_object(path, render(own).encode())
        except Exception as error:  # no permission, no network: each package of fsspec has its own
            raise StorageError(
                f"{path.parent} cannot be written to: {type(error).__name__}: {error}"
            ) from error
    # Linked, not opened: whoever sees the file sees all of it.
    temporary = _own_file(path, own)
    temporary.write_text(render(own), "utf-8")
    try:
        _link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def _own_file(path: Path, own: LockOwner) -> Path:
    return path.with_name(f"{LOCK_FILE}.{own.token}")


def _link(file: Path, path: Path) -> None:
    """Make a file appear whole at ``path``, unless there is one."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system
        with path.open("x", encoding="utf-8") as target:
            target.write(file.read_text("utf-8"))


def _acquire(path: Path, own: LockOwner, report: Callable[[str], None], hint: str) -> None:
    taken_over = False
    while not _create(path, own):
        owner = _read(path)
        if owner is not None and not _is_gone(path, owner, report):
            raise _locked_error(path, owner, hint)
        who = "a driver" if owner is None else f"process {owner.pid} on {owner.host}"
        report(f"taking over the lock of {who}, which is gone")
        taken_over = True
        if not is_local(path):
            if _read(path) == owner:
                remove(path)
            continue
        # Renamed, not deleted: of two that take it over, one finds that it is no longer there.
        removed = _own_file(path, own)
        with suppress(FileNotFoundError):
            path.rename(removed)
            if _read(removed) != owner:  # the other was quicker: this is its lock, put it back
                with suppress(FileExistsError):
                    _link(removed, path)
            removed.unlink()
    if taken_over and not is_local(path):
        time.sleep(BEAT_SECONDS)
        owner = _read(path)
        if owner is not None and owner.token != own.token:
            raise _locked_error(path, owner, hint)


def _locked_error(path: Path, owner: LockOwner, hint: str) -> LockedError:
    return LockedError(
        f"{path.parent} is being written by process {owner.pid} on {owner.host}, since "
        f"{owner.started}. Wait for it, or stop it.{hint}"
    )


def _is_gone(path: Path, owner: LockOwner, report: Callable[[str], None]) -> bool:
    dead = is_dead(owner)
    if dead is not None:
        return dead
    seconds = WATCH_BEATS * BEAT_SECONDS
    report(
        f"{path} belongs to process {owner.pid} on {owner.host}; watching for {seconds:.0f} s "
        "whether it is alive"
    )
    try:
        before = _life_sign(path)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, BEAT_SECONDS))
            if _life_sign(path) != before:
                return False
    except FileNotFoundError:
        return True
    return True


def _namespace() -> str:
    """What pids and ticks refer to: boot of this machine, and namespaces of this process."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    for kind in ("pid", "time"):
        with suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{kind}"))
    return " ".join(parts)


def _start_ticks(pid: int) -> str:
    """Start of a process on this machine in clock ticks since boot; empty if there is none.

    Pids are reused; pid and start together identify a process. /proc/PID/stat, field 22.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
