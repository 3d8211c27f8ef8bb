"""Signals that stop work in progress in an orderly way: Ctrl-C, and SIGTERM where asked for."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class WaitEndedError(Exception):
    """Somebody asked for the end of a wait, such as Ctrl-C."""


Handler = Callable[[int, FrameType | None], None]


@contextmanager
def draining(
    stop: threading.Event, *signals: signal.Signals, again_seconds: float = 0.0
) -> Iterator[None]:
    """Set an event at the first signal; raise KeyboardInterrupt at the second Ctrl-C.

    Args:
        stop: the event. If it is set by others, the first Ctrl-C counts as the second.
        signals: which signals set it; default: Ctrl-C.
        again_seconds: a Ctrl-C that follows another signal sooner than this is the same one.
    """
    last: float | None = None

    def receive(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        # Set once only: the lock in an event would deadlock a signal that interrupts its setting.
        if before is None and not stop.is_set():
            stop.set()
        elif number == signal.SIGINT and (before is None or last - before >= again_seconds):
            raise KeyboardInterrupt

    with _handled_by(receive, *(signals or (signal.SIGINT,))):
        yield


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C in the block, and in the processes that it starts."""
    with _handled_by(signal.SIG_IGN, signal.SIGINT):
        yield


@contextmanager
def _handled_by(handler: Handler | signal.Handlers, *signals: signal.Signals) -> Iterator[None]:
    """Replace the handlers of signals in the block. Outside the main thread Python cannot handle
    signals, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)
