"""One task a shard, on Dask: back-pressure, retry, quarantine, draining on Ctrl-C."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from typing import Any, TypeVar

R = TypeVar("R")
Outcome = tuple[int, R | BaseException]
Progress = Callable[[int, int], None]
"""Called with a shard and how many of its entries are done."""

DISK_FULL = (ENOSPC, EDQUOT, EFBIG)
"""Error numbers of a disk, a quota or a file-size limit that is reached."""
_TOPIC = "semroute-progress"
_listener: Progress | None = None
IN_FLIGHT = 2
"""Shards a worker has at most: one at work, one waiting."""
ATTEMPTS = 2
"""Times that a shard is tried when its task raises. A worker that dies is Dask's affair: the shard
goes to another worker, and is given up when it has killed three."""


class Interrupted(Exception):
    """Ctrl-C: the shards at work were finished, no other was begun."""


class DiskFullError(OSError):
    """The target cannot take more bytes; to try another shard would be in vain."""


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    shards: Sequence[int],
    function: Callable[..., R],
    arguments: Callable[[int], tuple[Any, ...]],
    *,
    workers: int,
    on_progress: Progress,
) -> Iterator[Outcome[R]]:
    """Call ``function(*arguments(shard))`` for every shard, in any order.

    Args:
        function: importable by name, so that workers can find it.
        arguments: called when a shard's turn comes, so that what tasks carry is never all alive.
        workers: processes; 0 runs in this process, without Dask.
        on_progress: gets what tasks tell by :func:`report_progress`, from another thread.

    Yields:
        Each shard with its result, or with the exception that ended its last attempt.

    Raises:
        Interrupted: after the first Ctrl-C, when the shards at work are done. The second Ctrl-C is
            a KeyboardInterrupt.
        DiskFullError: a task found the disk full; nothing further is begun.
    """
    execute = _in_process if workers == 0 else _on_cluster
    yield from execute(shards, function, arguments, workers, on_progress)


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


def _in_process(
    shards: Sequence[int],
    function: Callable[..., R],
    arguments: Callable[[int], tuple[Any, ...]],
    _workers: int,
    on_progress: Progress,
) -> Iterator[Outcome[R]]:
    with _listening(on_progress), _draining() as stopped:
        for shard in shards:
            if stopped.is_set():
                raise Interrupted
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    yield shard, function(*arguments(shard))
                    break
                except Exception as error:
                    _raise_if_full(error)
                    if attempt == ATTEMPTS:
                        yield shard, error


def _on_cluster(
    shards: Sequence[int],
    function: Callable[..., R],
    arguments: Callable[[int], tuple[Any, ...]],
    workers: int,
    on_progress: Progress,
) -> Iterator[Outcome[R]]:
    import dask
    from distributed import Client, LocalCluster, as_completed

    settings = {
        # A task may hold its worker for long, a model's loading above all.
        "distributed.scheduler.worker-ttl": "30 minutes",
        # Dask has glibc give memory back at every turn, and with that a model's activations are
        # mapped, cleared and unmapped layer by layer: a quarter of the time went there.
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": str(2**33),
        "distributed.nanny.pre-spawn-environ.MALLOC_MMAP_THRESHOLD_": str(2**30),
    }
    queue = iter(shards)
    attempts: dict[str, tuple[int, int]] = {}
    with (
        dask.config.set(settings),
        _ignoring_interrupts(),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
        _draining() as stopped,
    ):
        client.subscribe_topic(_TOPIC, lambda event: on_progress(*event[1]))

        def submit(shard: int, attempt: int = 1) -> Any:
            key = f"shard-{shard}-{attempt}"
            attempts[key] = (shard, attempt)
            return client.submit(function, *arguments(shard), key=key, pure=False)

        def next_task() -> list[Any]:
            shard = None if stopped.is_set() else next(queue, None)
            return [] if shard is None else [submit(shard)]

        pending = as_completed([task for _ in range(IN_FLIGHT * workers) for task in next_task()])
        for future in pending:
            shard, attempt = attempts.pop(future.key)
            error = future.exception()
            if error is None:
                yield shard, future.result()
            else:
                _raise_if_full(error)
                if attempt < ATTEMPTS and not stopped.is_set():
                    pending.add(submit(shard, attempt + 1))
                    continue
                yield shard, error
            future.release()
            pending.update(next_task())
        if stopped.is_set():
            raise Interrupted


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
def _draining() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises KeyboardInterrupt."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(_signal: int, _frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, previous)
