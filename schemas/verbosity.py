"""How much is said while something runs: ``--quiet`` and ``--verbose``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Level = Literal["quiet", "normal", "verbose"]
_levels: list[Level] = ["normal"]


@contextmanager
def speaking(level: Level) -> Iterator[None]:
    """Say less or more for a while, in all threads of this process.

    Args:
        level: quiet: results, warnings and errors only; verbose: the time of each line, progress
            every few seconds, and the traceback of an error.
    """
    _levels.append(level)
    try:
        yield
    finally:
        _levels.pop()


def speaks() -> Level:
    """How much is to be said."""
    return _levels[-1]


def progress_bar(*arguments: Any, disable: bool = False, **options: Any) -> Any:
    """A bar of tqdm, which is not shown if little is to be said."""
    from tqdm.auto import tqdm

    make: Any = tqdm
    return make(*arguments, disable=disable or speaks() == "quiet", **options)
