"""Executor in this process, without Dask."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .base import (
    ATTEMPTS,
    Deferred,
    Executor,
    Interrupted,
    Outcome,
    Progress,
    R,
    listening,
    raise_if_disk_full,
)


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
        shards: Sequence[int],
        function: Callable[..., R | Deferred[R]],
        arguments: Callable[[int], tuple[Any, ...]],
        on_progress: Progress,
    ) -> Iterator[Outcome[R]]:
        # this thread  | task 0 | task 1  | task 2  |
        # writer       |        | write 0 | write 1 | write 2 |
        waiting, attempts = deque(shards), Counter[int]()
        with listening(on_progress), ThreadPoolExecutor(1) as writer:
            previous: tuple[int, Future[R]] | None = None
            while waiting or previous is not None:
                current = None
                if waiting and not self.stop.is_set():
                    shard = waiting.popleft()
                    attempts[shard] += 1
                    current = shard, _start(writer, function, arguments, shard)
                elif previous is None:
                    raise Interrupted
                if previous is not None:
                    shard, written = previous
                    error = written.exception()
                    if error is None:
                        yield shard, written.result()
                    else:
                        self.num_errors += 1
                        raise_if_disk_full(error)
                        if attempts[shard] < ATTEMPTS:
                            waiting.appendleft(shard)
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
