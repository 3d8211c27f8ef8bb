"""Many transfers at once, by threads of one process; tries are repeated, and counted."""

import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ....schemas import InputError
from ....schemas.files import StorageError

THREADS = 64
"""Transfers in flight. At 20 ms, 64 ranges of 64 KB each are 200 MB/s."""
BACKGROUND = 16
"""Of these, transfers that nobody waits for yet."""
TRIES = 10
BACKOFF, MAX_BACKOFF = 0.1, 10.0
"""Seconds before the second try, doubled each time up to the largest: half a minute in all."""
_PERMANENT = (
    InputError,
    FileNotFoundError,
    PermissionError,
    NotADirectoryError,
    NotImplementedError,
)
_PACE_SECONDS = 5.0

T = TypeVar("T")


@dataclass
class TransferCounts:
    """What was fetched since the start.

    Attributes:
        requests: parts that were fetched, each time that it was tried.
        num_bytes: of these parts.
        retries: tries that failed and were repeated.
        cached_bytes: that came from the local cache instead.
        refetched: chunks in the cache that were damaged.
        uncached: chunks that the cache had no room for.
    """

    requests: int = 0
    num_bytes: int = 0
    retries: int = 0
    cached_bytes: int = 0
    refetched: int = 0
    uncached: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **numbers: int) -> None:
        with self._lock:
            for name, number in numbers.items():
                setattr(self, name, getattr(self, name) + number)


@dataclass(eq=False)
class Task:
    """Work for a thread, and its result once it is done."""

    run: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class _Queue:
    """Tasks that wait: those that somebody waits for, and the rest."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.urgent: deque[Task] = deque()
        self.background: deque[Task] = deque()
        self.num_background = self.num_idle = self.num_threads = 0
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()
        with self.changed:
            for task in (*self.urgent, *self.background):
                task.future.cancel()
            self.urgent.clear()
            self.background.clear()
            self.changed.notify_all()

    def work(self) -> None:
        """The loop of a thread."""
        while True:
            with self.changed:
                self.num_idle += 1
                while not self._ready() and not self.closed.is_set():
                    self.changed.wait()
                self.num_idle -= 1
                if self.closed.is_set():
                    return
                ahead = not self.urgent
                task = self.background.popleft() if ahead else self.urgent.popleft()
                self.num_background += ahead
            if task.future.set_running_or_notify_cancel():
                try:
                    task.future.set_result(task.run())
                except BaseException as error:
                    task.future.set_exception(error)
            del task
            if ahead:
                with self.changed:
                    self.num_background -= 1
                    self.changed.notify()

    def _ready(self) -> bool:
        return bool(self.urgent) or (bool(self.background) and self.num_background < BACKGROUND)


class Transfers:
    """Threads that fetch; they are daemons and end when this is gone or closed.

    Attributes:
        counts: of all transfers.
    """

    def __init__(self, counts: TransferCounts) -> None:
        self.counts = counts
        self._open()
        self._delivered: deque[tuple[float, int]] = deque()

    def _open(self) -> None:
        self._queue, self._process = _Queue(), os.getpid()
        self.close = weakref.finalize(self, self._queue.close)

    def submit(self, run: Callable[[], Any], *, background: bool = False) -> Task:
        """Run a function on a thread.

        Args:
            background: nobody waits for it yet.
        """
        if os.getpid() != self._process:  # threads do not survive a fork
            self._open()
        task, queue = Task(run), self._queue
        with queue.changed:
            if queue.closed.is_set():
                task.future.cancel()
                return task
            (queue.background if background else queue.urgent).append(task)
            waiting = len(queue.urgent) + len(queue.background)
            if queue.num_threads < THREADS and queue.num_idle < waiting:
                queue.num_threads += 1
                threading.Thread(target=queue.work, daemon=True, name="semroute-fetch").start()
            queue.changed.notify()
        return task

    def promote(self, task: Task) -> None:
        """Somebody waits for a task now."""
        queue = self._queue
        with queue.changed:
            if not task.future.running() and not task.future.done() and task in queue.background:
                queue.background.remove(task)
                queue.urgent.append(task)
                queue.changed.notify()

    def repeat(self, what: str, call: Callable[[], T]) -> T:
        """The result of a call, tried again after errors of the network, up to :data:`TRIES` times.

        Args:
            what: is fetched, for messages.

        Raises:
            InputError, FileNotFoundError, PermissionError: at once, as trying again cannot help.
            StorageError: every try failed; with the last error.
        """
        for number in range(TRIES):
            try:
                self.counts.add(requests=1)
                return call()
            except _PERMANENT:
                raise
            except Exception as error:  # of the network, of which each package has its own
                last = error
            if number + 1 < TRIES:
                self.counts.add(retries=1)
                pause = min(MAX_BACKOFF, BACKOFF * 2**number) * random.uniform(0.5, 1)
                if self._queue.closed.wait(pause):
                    break
        raise StorageError(
            f"{what} cannot be read: {number + 1} tries failed, the last with "
            f"{type(last).__name__}: {last}. Check the network, then rerun the same command"
        ) from last

    def is_busy(self) -> bool:
        """Whether anything is in flight or waits."""
        queue = self._queue
        with queue.changed:
            waiting = queue.urgent or queue.background
            return bool(waiting) or queue.num_idle < queue.num_threads

    def delivered(self, num_bytes: int) -> None:
        """Somebody has read so many bytes."""
        now = time.monotonic()
        self._delivered.append((now, num_bytes))
        while self._delivered and self._delivered[0][0] < now - _PACE_SECONDS:
            self._delivered.popleft()

    def pace(self) -> float:
        """Bytes per second that were read in the last seconds."""
        recent = [*self._delivered]
        if not recent:
            return 0.0
        seconds = time.monotonic() - recent[0][0]
        return sum(num for _, num in recent) / max(0.5, min(_PACE_SECONDS, seconds))
