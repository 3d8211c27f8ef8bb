"""Executor on Dask: processes on this machine, or the workers of a cluster."""

import asyncio
import logging
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from ...schemas import InputError
from ...schemas.interrupts import ignoring_interrupts
from .base import (
    ATTEMPTS,
    PAUSE_SECONDS,
    PROGRESS_TOPIC,
    ClusterLostError,
    Deferred,
    Executor,
    Interrupted,
    Outcome,
    Progress,
    R,
    raise_if_disk_full,
)

IN_FLIGHT = 3
"""Maximum number of shards per worker: one in progress, one being written, one waiting."""
TASK = "shard"
"""Dask's name for all tasks."""
NO_PROFILE = {"distributed.worker.profile.enabled": False}
"""Dask setting: no samples of what workers do, a hundred per second. On Python 3.11 each may stop
its worker for ever where threads come and go (python/cpython#106883, dask/distributed#8616)."""
COUNT_SECONDS = 1.0
"""Interval at which workers are counted while tasks run."""
CONNECT_SECONDS = 30
"""Time within which a scheduler must answer."""


class DaskExecutor(Executor):
    """Runs tasks on Dask: Dask schedules, and gives the shard of a worker that dies to another one.
    A shard whose three workers died is tried once more, at the end and alone, so that no shard is
    given up because of its neighbour; then it is given up.

    Args:
        workers: processes to start on this machine; None: ``connect`` reaches a cluster.
        connect: makes the client of that cluster.
        name: of the cluster, with its preposition: ``at tcp://host:8786``.
        max_workers: workers that the cluster may grow to. At least so many shards wait, because a
            job queue starts jobs for those that do.
        find_problem: says why the cluster will have no workers; empty if it may.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        connect: Callable[[ExitStack], Any] | None = None,
        name: str = "",
        max_workers: int = 1,
        find_problem: Callable[[], str] = str,
    ) -> None:
        super().__init__(workers)
        self.connect = connect or self._start_workers
        self.name = name
        self.max_workers = max_workers
        self.find_problem = find_problem
        self._resources = ExitStack()
        self._client: Any = None

    def __exit__(self, *_exception: object) -> None:
        self._resources.close()
        self._client = None

    def __str__(self) -> str:
        if self.workers is None:
            return self.name
        return "1 worker" if self.workers == 1 else f"{self.workers} workers"

    @property
    def client(self) -> Any:
        """The Dask client; its first use starts the workers on this machine.

        Raises:
            InputError: no scheduler answers.
        """
        if self._client is None:
            # In a terminal Ctrl-C reaches every process of the group. Workers must inherit that it
            # is ignored, or they die while the driver waits for them.
            with ignoring_interrupts():
                self._client = self.connect(self._resources)
        return self._client

    def _start_workers(self, resources: ExitStack) -> Any:
        import dask
        from distributed import Client, Nanny, SpecCluster

        from .private import PrivateScheduler, PrivateWorker, has_dashboard, make_keys, make_prefix

        prefix = make_prefix()
        settings = {
            # A task may occupy its worker for long, above all while it loads a model.
            "distributed.scheduler.worker-ttl": "30 minutes",
            **NO_PROFILE,
            # Dask has glibc return memory at once, so that the activations of a model are mapped,
            # cleared and unmapped layer by layer: that took a quarter of the time.
            "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**33),
            "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(2**30),
            **dashboard_link(f"127.0.0.1:{{port}}{prefix}"),
        }
        resources.enter_context(dask.config.set(settings))
        # As distributed's LocalCluster, which takes no classes of its scheduler and workers.
        own = {"host": "127.0.0.1", "protocol": "tls://", "security": make_keys()}
        scheduler = {
            **{"port": 0, "http_prefix": prefix, "dashboard": has_dashboard(), **own},
            "dashboard_address": "127.0.0.1:0",
        }
        worker = {
            **{"worker_class": PrivateWorker, "nthreads": 1, "dashboard": False, **own},
            "memory_limit": 0,  # the weights of a model would count towards it
            "silence_logs": logging.CRITICAL,
        }
        cluster = SpecCluster(
            scheduler={"cls": PrivateScheduler, "options": scheduler},
            workers={
                number: {"cls": Nanny, "options": worker} for number in range(self.workers or 1)
            },
            security=own["security"],
            silence_logs=logging.CRITICAL,
        )
        resources.enter_context(cluster)
        return resources.enter_context(Client(cluster, set_as_default=False))

    def limit(self, num: int) -> None:
        if self.workers is not None and self._client is None:
            self.workers = min(self.workers, num)

    def dashboard(self) -> str:
        from .private import has_dashboard

        if not has_dashboard():
            return ""
        with self._reaching_workers():
            return str(self.client.dashboard_link)

    def ask(self, function: Callable[..., R], *arguments: Any) -> dict[str, R]:
        with self._reaching_workers():
            answers: dict[str, R] = self.client.run(function, *arguments)
            return answers

    def threads(self) -> dict[str, int]:
        """Number of threads of every worker, by address.

        Raises:
            ClusterLostError: the scheduler is gone.
        """
        with self._reaching_workers():
            threads: dict[str, int] = self.client.nthreads()
            return threads

    def check(self) -> None:
        """Refuse to wait for workers that will not come.

        Raises:
            ClusterLostError: the scheduler is gone, or jobs of a batch system do not start.
        """
        if self.client.status != "running":
            raise _lost(self.client)
        problem = self.find_problem()
        if problem:
            raise ClusterLostError(
                f"the workers {self.name} do not start: {problem}. Correct its options (a job's "
                "log is in log_directory, or else in the current folder), then rerun the same "
                "command. Shards that were written are complete and kept."
            )

    @contextmanager
    def waiting_task(self) -> Iterator[None]:
        """Keep a task waiting: without one, a cluster that adapts to its work has no worker."""
        future = self.client.submit(int, pure=False)
        try:
            yield
        finally:
            future.release()

    @contextmanager
    def _reaching_workers(self) -> Iterator[None]:
        client = self.client
        try:
            yield
        except (OSError, TimeoutError) as error:  # CommClosedError is an OSError
            raise _lost(client, f", or one of its workers, is gone: {error}") from error

    def _execute(
        self,
        shards: Iterable[int | None],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        if shards == [] and self._client is None:
            return  # starts no worker
        client = self.client
        client.subscribe_topic(PROGRESS_TOPIC, lambda event: on_progress(*event[1]))
        try:
            with _Tasks(self, function, arguments) as tasks:
                deadly: list[int] = []
                for shard, outcome in tasks.run(shards):
                    # Of shards without end there is no last one, after which to try it alone.
                    if _kills_workers(outcome) and isinstance(shards, Sequence):
                        deadly.append(shard)
                    else:
                        yield shard, outcome
                for shard in deadly:
                    yield from tasks.run([shard])
        finally:
            client.unsubscribe_topic(PROGRESS_TOPIC)
        if self.stop.is_set():
            raise Interrupted


class _Tasks:
    """Tasks in flight. A context manager: at its end those that are left are cancelled."""

    def __init__(
        self,
        executor: DaskExecutor,
        function: Callable[..., Any],
        arguments: Callable[[int], tuple[Any, ...]],
    ) -> None:
        self.executor, self.client = executor, executor.client
        self.function, self.arguments = function, arguments
        self.in_flight: dict[str, tuple[int, int, Any]] = {}  # key -> shard, attempt, future
        self.done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.num_submitted = 0
        self.counted = 0.0
        self.max_in_flight = IN_FLIGHT

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for _, _, future in self.in_flight.values():
            future.cancel()
        self.in_flight.clear()

    def run(self, shards: Iterable[int | None]) -> Iterator[Outcome[Any]]:
        """Every shard with its outcome, until the executor is to stop."""
        waiting, stop, ended = iter(shards), self.executor.stop, False
        while True:
            seconds = COUNT_SECONDS
            while not ended and not stop.is_set() and len(self.in_flight) < self._count_room():
                try:
                    shard = next(waiting)
                except StopIteration:
                    ended = True
                    break
                if shard is None:
                    seconds = PAUSE_SECONDS
                    break
                self._submit(shard, attempt=1)
            if not self.in_flight and (ended or stop.is_set()):
                return
            try:
                future = self.done.get(timeout=seconds)
            except queue.Empty:
                self.executor.check()
                continue
            shard, attempt, _ = self.in_flight.pop(future.key)
            outcome = self._outcome(future)
            future.release()
            if isinstance(outcome, BaseException):
                self.executor.num_errors += 1
                raise_if_disk_full(outcome)
                may_retry = attempt < ATTEMPTS and not _kills_workers(outcome)
                if may_retry and not stop.is_set():
                    self._submit(shard, attempt + 1)
                    continue
            yield shard, outcome

    def _submit(self, shard: int, attempt: int) -> None:
        self.num_submitted += 1
        key = f"{TASK}-{shard}-{os.getpid()}-{self.num_submitted}"
        arguments = (self.function, *self.arguments(shard))
        future = self.client.submit(_run_in_worker, *arguments, key=key, pure=False)
        self.in_flight[key] = (shard, attempt, future)
        future.add_done_callback(self.done.put)

    def _count_room(self) -> int:
        """Maximum number of shards in flight. Workers come and go, so they are counted again and
        again."""
        if time.monotonic() - self.counted > COUNT_SECONDS:
            self.executor.check()
            num_workers = len(self.executor.threads())
            self.executor.num_workers = num_workers
            self.max_in_flight = max(IN_FLIGHT * max(1, num_workers), self.executor.max_workers)
            self.counted = time.monotonic()
        return self.max_in_flight

    def _outcome(self, future: Any) -> Any:
        try:
            error = future.exception()
            return future.result() if error is None else error
        except (CancelledError, asyncio.CancelledError) as error:
            raise _lost(self.client) from error


def _run_in_worker(function: Callable[..., R | Deferred[R]], *arguments: Any) -> R:
    """Run a task in a Dask worker, which starts another one while this one writes: a task that
    secedes frees its thread (distributed.secede)."""
    result = function(*arguments)
    if not isinstance(result, Deferred):
        return result
    from distributed import secede

    secede()
    return result.finish()


def _lost(client: Any, how: str = " is gone") -> ClusterLostError:
    return ClusterLostError(
        f"the scheduler at {client.scheduler.address}{how}. Shards that were written are complete "
        "and kept; start a cluster and rerun the same command to resume."
    )


def _kills_workers(outcome: Any) -> bool:
    from distributed import KilledWorker

    return isinstance(outcome, KilledWorker)


def connect_client(resources: ExitStack, name: str, **options: Any) -> Any:
    """Connect to a scheduler.

    Args:
        resources: closes the client.
        name: of the scheduler in messages.
        options: of ``distributed.Client``.

    Raises:
        InputError: no scheduler answers.
    """
    from distributed import Client

    # Its errors are raised, or reported in other words, and need no traceback in the log.
    logger = logging.getLogger("distributed.client")
    resources.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.CRITICAL)
    try:
        return resources.enter_context(
            Client(**options, timeout=CONNECT_SECONDS, set_as_default=False)
        )
    except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS without keys
        raise InputError(
            f"no Dask scheduler answers at {name}: {error}. Is it running, is the port open, and "
            "are TLS keys in Dask's configuration?"
        ) from error


def dashboard_link(place: str) -> dict[str, str]:
    """Dask setting: what is printed as the dashboard's address.

    Args:
        place: host, port and path in Dask's template.
    """
    return {"distributed.dashboard.link": f"http://{place}/status"}


def no_profile_variable() -> str:
    """:data:`NO_PROFILE` as an environment variable, as dask.config reads it."""
    ((key, value),) = NO_PROFILE.items()
    return f"DASK_{key.upper().replace('.', '__')}={value}"
