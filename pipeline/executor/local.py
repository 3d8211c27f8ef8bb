"""Executor in this process, without Dask."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

from .base import (
    ATTEMPTS,
    PAUSE_SECONDS,
    Deferred,
    Executor,
    Interrupted,
    Outcome,
    Progress,
    R,
    listening,
    raise_if_disk_full,
)

_END = -1
"""Number in place of a shard, after the last one."""


class LocalExecutor(Executor):
    """Runs one task after another in this process, and writes each shard during the next task."""

    def __init__(self) -> None:
        super().__init__(workers=0)

    def __str__(self) -> str:
        return "in this process"

    def limit(self, num: int) -> None:
        return

    def dashboard(self) -> str:
        return ""

    def ask(self, function: Callable[..., R], *arguments: Any) -> dict[str, R]:
        return {"": function(*arguments)}

    def _execute(
        self,
        shards: Iterable[int | None],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        # this thread  | task 0 | task 1  | task 2  |
        # writer       |        | write 0 | write 1 | write 2 |
        attempts = Counter[int]()
        waiting: Iterator[int | None] = iter(shards)
        with listening(on_progress), ThreadPoolExecutor(1) as writer:
            previous: tuple[int, Future[R]] | None = None
            ended = False
            while not ended or previous is not None:
                current, number = None, None
                if not ended and (previous is None or not self.stop.is_set()):
                    number = next(waiting, _END)
                    ended = number == _END
                    if self.stop.is_set() and not ended:
                        raise Interrupted
                if number is not None and not ended:
                    attempts[number] += 1
                    current = number, _start(writer, function, arguments, number)
                elif previous is None and not ended:
                    self.stop.wait(PAUSE_SECONDS)
                if previous is not None:
                    shard, written = previous
                    error = written.exception()
                    if error is None:
                        yield shard, written.result()
                    else:
                        self.num_errors += 1
                        raise_if_disk_full(error)
                        if attempts[shard] < ATTEMPTS:
                            waiting, ended = chain([shard], waiting), False
                        else:
                            yield shard, error
                previous = current


def _start(
    writer: ThreadPoolExecutor,
    function: Callable[..., R | Deferred[R]],
    arguments: Callable[[int], tuple[Any, ...]],
    shard: int,
) -> "Future[R]":
    """Run a task in this thread, and leave its writing to another."""
    written: Future[R] = Future()
    try:
        result = function(*arguments(shard))
    except Exception as error:
        written.set_exception(error)
        return written
    if isinstance(result, Deferred):
        return writer.submit(result.finish)
    written.set_result(result)
    return written
