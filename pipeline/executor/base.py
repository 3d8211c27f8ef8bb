"""One task a shard: in this process, on this machine's cores or GPUs, or on a Dask cluster.

Back-pressure, retry, what kills its worker, and draining on Ctrl-C. Scheduling is Dask's.
"""

import asyncio
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from errno import EDQUOT, EFBIG, ENOSPC
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from ...schemas import InputError

R = TypeVar("R")
Outcome = tuple[int, R | BaseException]
Progress = Callable[[int, int], None]
"""Called with a shard and how many of its entries are done."""

DISK_FULL = (ENOSPC, EDQUOT, EFBIG)
"""Error numbers of a disk, a quota or a file-size limit that is reached."""
_TOPIC = "semroute-progress"
_listener: Progress | None = None
IN_FLIGHT = 3
"""Shards a worker has at most: one at work, one being written, one waiting."""
ATTEMPTS = 2
"""Times that a shard is tried when its task raises. A worker that dies is Dask's affair: the shard
goes to another worker. One that was on three workers that died is tried once more at the end and
alone, so that no shard is given up for what its neighbour did; then it is given up."""
TASK = "shard"
"""What Dask calls them all."""
NO_PROFILE = {"distributed.worker.profile.enabled": False}
"""Setting of Dask: no samples of what workers do, a hundred a second. On Python 3.11 each may stop
its worker for ever where threads come and go (python/cpython#106883, dask/distributed#8616)."""
LOOK_SECONDS = 1.0
"""How often workers are counted while tasks run."""


@dataclass(frozen=True)
class Deferred(Generic[R]):
    """What a task returns in place of its result when all that is left of it is writing: the next
    task begins meanwhile.

    Attributes:
        finish: writes, and returns the result.
    """

    finish: Callable[[], R]


class Interrupted(Exception):
    """Ctrl-C: the shards at work were finished, no other was begun."""


class DiskFullError(OSError):
    """The target cannot take more bytes; to try another shard would be in vain."""


class ClusterLostError(InputError):
    """The scheduler is gone, and with it the knowledge of who does what."""


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_name() -> str:
    """What receipts call this process: ``host:pid``."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass
class Cluster:
    """Where tasks run. A context: workers are started when first needed, and stopped at its end.

    Attributes:
        workers: processes on this machine; 0: this process, without Dask; None: a Dask cluster has
            as many as it has.
        connect: makes the client of that cluster; for a cluster on this machine None.
        name: how the place is put to people.
        expected: workers that it may have: by so many shards at least that wait, a job queue knows
            how many jobs there is work for.
        num_errors: attempts that failed, also of shards that were written in the end.
        stop: set, by Ctrl-C or by others, no further shard is begun.
    """

    workers: int | None
    connect: Callable[[ExitStack], Any] | None = None
    name: str = ""
    expected: int = 1
    num_errors: int = 0
    stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _present: int = 0
    _resources: ExitStack = field(default_factory=ExitStack, repr=False)
    _client: Any = field(default=None, repr=False)

    def __enter__(self) -> "Cluster":
        return self

    def __str__(self) -> str:
        if self.connect is not None:
            return self.name
        names = {0: "in this process", 1: "1 worker"}
        return names.get(self.workers or 0, f"{self.workers} workers")

    def limit(self, num: int) -> None:
        """Start no more workers of this machine than there is work for."""
        if self.workers is not None and self._client is None:
            self.workers = min(self.workers, num)

    def __exit__(self, *_exception: object) -> None:
        self._resources.close()
        self._client = None

    @property
    def client(self) -> Any:
        """The Dask client; the first use starts the workers of this machine.

        Raises:
            InputError: there is no scheduler at the address.
        """
        if self._client is None:
            with _ignoring_interrupts():
                connect = self.connect or self._start
                self._client = connect(self._resources)
        return self._client

    def _start(self, resources: ExitStack) -> Any:
        """Processes of this machine."""
        import dask
        from distributed import Client, LocalCluster

        settings = {
            # A task may hold its worker for long, a model's loading above all.
            "distributed.scheduler.worker-ttl": "30 minutes",
            **NO_PROFILE,
            # Dask has glibc give memory back at every turn, and with that a model's activations
            # are mapped, cleared and unmapped layer by layer: a quarter of the time went there.
            "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**33),
            "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(2**30),
        }
        resources.enter_context(dask.config.set(settings))
        cluster = LocalCluster(
            n_workers=self.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # a model's weights would count against it
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
        resources.enter_context(cluster)
        return resources.enter_context(Client(cluster, set_as_default=False))

    def dashboard(self) -> str:
        """Where Dask's own pages are; "" where they are not served: they need bokeh, and Dask.

        Raises:
            ClusterLostError: the scheduler is gone.
        """
        if self.workers == 0 or find_spec("bokeh") is None:
            return ""
        with self._reaching():
            return str(self.client.dashboard_link)

    def num_workers(self) -> int:
        """Workers that were there when they were last counted; 0 without Dask."""
        return self._present

    def ask(self, function: Callable[..., R], *arguments: Any) -> dict[str, R]:
        """Call a function in every worker there is: address -> what it says.

        Raises:
            ClusterLostError: the scheduler, or a worker, went away meanwhile.
        """
        if self.workers == 0:
            return {"": function(*arguments)}
        with self._reaching():
            found: dict[str, R] = self.client.run(function, *arguments)
            return found

    def threads(self) -> dict[str, int]:
        """Threads of every worker there is, by address.

        Raises:
            ClusterLostError: the scheduler is gone.
        """
        with self._reaching():
            found: dict[str, int] = self.client.nthreads()
            return found

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """A task waits meanwhile: without one, a cluster that adapts to its work has no worker."""
        future = self.client.submit(int, pure=False)
        try:
            yield
        finally:
            future.release()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        client = self.client
        try:
            yield
        except (OSError, TimeoutError) as error:  # CommClosedError is an OSError
            raise _lost(client, f", or a worker of it, is gone: {error}") from error

    def run(
        self,
        shards: Sequence[int],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        *,
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        """Call ``function(*arguments(shard))`` for every shard, in any order.

        Args:
            function: importable by name, so that workers can find it. What it returns is the
                result, or :class:`Deferred` that gives it.
            arguments: called when a shard's turn comes, so that what tasks carry is never all
                alive.
            on_progress: gets what tasks tell by :func:`report_progress`, from another thread.

        Yields:
            Each shard with its result, or with the exception that ended its last attempt.

        Raises:
            Interrupted: after the first Ctrl-C, when the shards at work are done. The second
                Ctrl-C is a KeyboardInterrupt.
            DiskFullError: a task found the disk full; nothing further is begun.
            ClusterLostError: the scheduler is gone.
        """
        execute = self._in_process if self.workers == 0 else self._on_dask
        with _draining(self.stop):
            yield from execute(shards, function, arguments, on_progress, self.stop)

    def _in_process(
        self,
        shards: Sequence[int],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
        stopped: threading.Event,
    ) -> Iterator[Outcome[R]]:
        """One after the other, but that each is written while the next is at work."""
        waiting, attempts = deque(shards), Counter[int]()
        with _listening(on_progress), ThreadPoolExecutor(1) as writer:
            last: tuple[int, Future[R]] | None = None
            while waiting or last is not None:
                begun = None
                if waiting and not stopped.is_set():
                    shard = waiting.popleft()
                    attempts[shard] += 1
                    begun = shard, _begin(writer, function, arguments, shard)
                elif last is None:
                    raise Interrupted
                if last is not None:
                    shard, written = last
                    error = written.exception()
                    if error is None:
                        yield shard, written.result()
                    else:
                        self.num_errors += 1
                        _raise_if_full(error)
                        if attempts[shard] < ATTEMPTS:
                            waiting.appendleft(shard)
                        else:
                            yield shard, error
                last = begun

    def _on_dask(
        self,
        shards: Sequence[int],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
        stopped: threading.Event,
    ) -> Iterator[Outcome[R]]:
        client = self.client
        client.subscribe_topic(_TOPIC, lambda event: on_progress(*event[1]))
        tasks = _Tasks(self, function, arguments)
        try:
            deadly: list[int] = []
            for shard, outcome in tasks.run(shards, stopped):
                if _kills_workers(outcome):
                    deadly.append(shard)
                else:
                    yield shard, outcome
            for shard in deadly:
                yield from tasks.run([shard], stopped)
        finally:
            tasks.abandon()
            client.unsubscribe_topic(_TOPIC)
        if stopped.is_set():
            raise Interrupted


class _Tasks:
    """Shards in flight on a Dask cluster."""

    def __init__(
        self,
        cluster: Cluster,
        function: Callable[..., Any],
        arguments: Callable[[int], tuple[Any, ...]],
    ) -> None:
        self.cluster, self.client = cluster, cluster.client
        self.function, self.arguments = function, arguments
        self.in_flight: dict[str, tuple[int, int, Any]] = {}  # key -> shard, attempt, future
        self.done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.number = 0
        self.looked = 0.0
        self.room = IN_FLIGHT

    def run(self, shards: Sequence[int], stopped: threading.Event) -> Iterator[Outcome[Any]]:
        """Every shard with its outcome, until Ctrl-C."""
        waiting = iter(shards)
        while True:
            while not stopped.is_set() and len(self.in_flight) < self._room():
                shard = next(waiting, None)
                if shard is None:
                    break
                self._submit(shard, 1)
            if not self.in_flight:
                return
            try:
                future = self.done.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self._check_scheduler()
                continue
            shard, attempt, _ = self.in_flight.pop(future.key)
            outcome = self._outcome(future)
            future.release()
            if isinstance(outcome, BaseException):
                self.cluster.num_errors += 1
                _raise_if_full(outcome)
                again = attempt < ATTEMPTS and not _kills_workers(outcome)
                if again and not stopped.is_set():
                    self._submit(shard, attempt + 1)
                    continue
            yield shard, outcome

    def abandon(self) -> None:
        """Let go of what is still in flight."""
        for _, _, future in self.in_flight.values():
            future.cancel()
        self.in_flight.clear()

    def _submit(self, shard: int, attempt: int) -> None:
        self.number += 1
        key = f"{TASK}-{shard}-{os.getpid()}-{self.number}"
        arguments = (self.function, *self.arguments(shard))
        future = self.client.submit(_run_in_worker, *arguments, key=key, pure=False)
        self.in_flight[key] = (shard, attempt, future)
        future.add_done_callback(self.done.put)

    def _room(self) -> int:
        """How many shards may be in flight: workers come and go."""
        if time.monotonic() - self.looked > LOOK_SECONDS:
            self._check_scheduler()
            self.cluster._present = len(self.cluster.threads())
            self.room = max(IN_FLIGHT * max(1, self.cluster._present), self.cluster.expected)
            self.looked = time.monotonic()
        return self.room

    def _outcome(self, future: Any) -> Any:
        try:
            error = future.exception()
            return future.result() if error is None else error
        except (CancelledError, asyncio.CancelledError) as error:
            raise _lost(self.client) from error

    def _check_scheduler(self) -> None:
        if self.client.status != "running":
            raise _lost(self.client)


def _begin(
    writer: ThreadPoolExecutor,
    function: Callable[..., R | Deferred[R]],
    arguments: Callable[[int], tuple[Any, ...]],
    shard: int,
) -> "Future[R]":
    """Run a task here up to its writing, which is another thread's."""
    written: Future[R] = Future()
    try:
        found = function(*arguments(shard))
    except Exception as error:
        written.set_exception(error)
        return written
    if isinstance(found, Deferred):
        return writer.submit(found.finish)
    written.set_result(found)
    return written


def _run_in_worker(function: Callable[..., R | Deferred[R]], *arguments: Any) -> R:
    """Run a task in a worker of Dask, which begins another while this one writes: a task that
    secedes gives its thread away (distributed.secede)."""
    found = function(*arguments)
    if not isinstance(found, Deferred):
        return found
    from distributed import secede

    secede()
    return found.finish()


def _lost(client: Any, how: str = " is gone") -> ClusterLostError:
    return ClusterLostError(
        f"the scheduler at {client.scheduler.address}{how}. What is written is whole and kept; "
        "start a cluster and run the same command again."
    )


def _kills_workers(outcome: Any) -> bool:
    from distributed import KilledWorker

    return isinstance(outcome, KilledWorker)


def report_progress(shard: int, done: int) -> None:
    """Tell the driver how many entries of a shard are done; called by a task, as often as it likes.

    Nothing depends on it: it is lost where nobody listens.
    """
    if _listener is not None:
        _listener(shard, done)
        return
    from distributed import get_worker

    try:
        worker = get_worker()
    except ValueError:  # called outside run
        return
    worker.log_event(_TOPIC, (shard, done))


def _raise_if_full(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        raise DiskFullError(error.errno, error.strerror, error.filename) from error


@contextmanager
def _listening(on_progress: Progress) -> Iterator[None]:
    """Hear tasks that run in this process."""
    global _listener
    _listener = on_progress
    try:
        yield
    finally:
        _listener = None


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C in a terminal reaches every process of the group. Workers must inherit that it is
    ignored, or they die under the driver that waits for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _draining(stopped: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets an event; the second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_signal: int, _frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


CONNECT_SECONDS = 30
"""Within which a scheduler must answer."""


def connect_client(resources: ExitStack, name: str, **where: Any) -> Any:
    from distributed import Client

    # Its errors are raised, or told in other words, and need no traceback besides.
    logger = logging.getLogger("distributed.client")
    resources.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.CRITICAL)
    try:
        return resources.enter_context(
            Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
        )
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS without keys
        raise InputError(
            f"no Dask scheduler answers at {name}: {error}. Is it running, is the port open, and "
            "are TLS keys in Dask's configuration?"
        ) from error
