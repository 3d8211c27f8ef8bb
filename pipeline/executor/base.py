"""One task per shard: what an executor does, and what its tasks return, raise and report."""

import os
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from typing import Any, Generic, Self, TypeVar

from ...schemas import InputError
from ...schemas.interrupts import draining

R = TypeVar("R")
Outcome = tuple[int, R | BaseException]
Progress = Callable[[int, int], None]
"""Called with a shard and the number of its entries that are done."""

DISK_FULL = (ENOSPC, EDQUOT, EFBIG)
"""Error numbers of a full disk, a used-up quota and a reached file-size limit."""
PROGRESS_TOPIC = "semroute-progress"
"""Dask's topic of :func:`report_progress`."""
PAUSE_SECONDS = 0.1
"""Pause before shards are asked for again, where there was none."""
ATTEMPTS = 2
"""How often a shard is tried when its task raises."""

_listener: Progress | None = None


@dataclass(frozen=True)
class Deferred(Generic[R]):
    """Returned by a task in place of its result when only writing is left to do, so that the next
    task can start meanwhile.

    Attributes:
        finish: writes, and returns the result.
    """

    finish: Callable[[], R]


class Interrupted(Exception):
    """Ctrl-C: the shards in progress were finished, and no others were started."""


class DiskFullError(OSError):
    """The target cannot take more bytes; trying another shard would fail too."""


class ClusterLostError(InputError):
    """The scheduler is gone, and with it all knowledge of who does what."""


class Executor(ABC):
    """Calls functions, once per shard. A context manager: workers are started when they are first
    needed, and stopped at its end.

    Attributes:
        workers: processes on this machine; 0: none but this one; None: the workers of a cluster.
        num_workers: Dask workers when they were last counted; 0 without Dask.
        num_errors: failed attempts, including those at shards that were written in the end.
        stop: once it is set, by Ctrl-C or by others, no further shard is started.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers
        self.num_workers = 0
        self.num_errors = 0
        self.stop = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        return

    @abstractmethod
    def __str__(self) -> str:
        """Who executes, to be appended to a line: ``2 workers``."""

    @abstractmethod
    def limit(self, num: int) -> None:
        """Start no more workers on this machine than there are tasks."""

    @abstractmethod
    def dashboard(self) -> str:
        """Address of Dask's dashboard; "" without one.

        Raises:
            ClusterLostError: the scheduler is gone.
        """

    @abstractmethod
    def ask(self, function: Callable[..., R], *arguments: Any) -> dict[str, R]:
        """Call a function once in every worker: address -> result.

        Raises:
            ClusterLostError: the scheduler or a worker went away meanwhile.
        """

    def run(
        self,
        shards: Iterable[int | None],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        """Call ``function(*arguments(shard))`` for every shard, in any order.

        Args:
            shards: taken as workers become free; None: there is none now, and perhaps one soon.
            function: importable by name, so that workers can find it. It returns the result, or a
                :class:`Deferred` that gives it.
            arguments: called when a shard's turn comes, so that the arguments of all tasks are
                never in memory together.
            on_progress: receives what tasks report by :func:`report_progress`, from any thread.

        Yields:
            Each shard with its result, or with the exception that ended its last attempt.

        Raises:
            Interrupted: after SIGTERM or the first Ctrl-C, when the shards in progress are done.
                The next Ctrl-C raises KeyboardInterrupt.
            DiskFullError: a task found the disk full; nothing further is started.
            ClusterLostError: the scheduler is gone.
        """
        with draining(self.stop, signal.SIGINT, signal.SIGTERM):
            yield from self._execute(shards, function, arguments, on_progress)

    @abstractmethod
    def _execute(
        self,
        shards: Iterable[int | None],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        """Do the work of :meth:`run`, until ``stop`` is set."""


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_name() -> str:
    """Name of this process in receipts: ``host:pid``."""
    return f"{socket.gethostname()}:{os.getpid()}"


def report_progress(shard: int, done: int) -> None:
    """Report how many entries of a shard are done; a task may call it at any time.

    Nothing depends on it: without a listener the report is lost.
    """
    if _listener is not None:
        _listener(shard, done)
        return
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # called outside Executor.run
        return
    worker.log_event(PROGRESS_TOPIC, (shard, done))


@contextmanager
def listening(on_progress: Progress) -> Iterator[None]:
    """Receive the progress of tasks that run in this process."""
    global _listener
    _listener = on_progress
    try:
        yield
    finally:
        _listener = None


def raise_if_disk_full(error: BaseException) -> None:
    """Raise :class:`DiskFullError` in place of an error that means it."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise DiskFullError(error.errno, error.strerror, error.filename) from error
