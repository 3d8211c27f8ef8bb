"""What the ranks of a run tell one another besides the numbers of a step.

It goes through the key-value store of the rendezvous, not through the process group: so waiting may
take as long as it takes, whatever the timeout of the group, and a rank is heard even while another
one hangs in a collective. All values are text.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator

from ...schemas import InputError
from ...schemas.json_file import load_json

POLL_SECONDS = 0.1
"""Time between looks at the store."""
GRACE_SECONDS = 3.0
"""Time that ranks have to end by themselves after one has stopped, and that this one waits for them
to hear of it."""
_STOPPED, _HEARD, _CLOSED = "stopped", "heard", "closed"
_numbers = count(1)


class RankStopped(InputError):
    """Another rank has stopped the run; with its message."""


class Ranks:
    """The ranks of a run. One process is its own only rank, and waits for nobody.

    Attributes:
        rank: number of this one.
        num: number of all.
        host: name of this machine.
    """

    def __init__(self, rank: int = 0, num: int = 1, store: Any = None) -> None:
        self.rank, self.num, self.host = rank, num, socket.gethostname()
        self._store = store
        self._round = 0
        self._stopped = ""
        self._end = threading.Event()
        if store is not None:
            threading.Thread(target=self._watch, daemon=True, name="semroute-ranks").start()

    @property
    def is_main(self) -> bool:
        """Whether this rank is the first."""
        return self.rank == 0

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order, as soon as all have called it.

        Raises:
            RankStopped: another rank has stopped.
        """
        self._round += 1
        self.tell(f"round-{self._round}", text)
        return self.hear_all(f"round-{self._round}", text)

    def wait(self) -> None:
        """Wait until all ranks have called it, however long it takes.

        Raises:
            RankStopped: another rank has stopped.
        """
        self.gather("")

    def tell(self, name: str, text: str) -> None:
        """Put a text of this rank under a name that is used once. Any thread may."""
        if self._store is not None:
            self._store.set(f"{name}/{self.rank}", text)

    def hear_all(self, name: str, own: str) -> list[str]:
        """The texts of all ranks under a name, as soon as all have told theirs.

        Args:
            own: that of this rank.

        Raises:
            RankStopped: another rank has stopped.
        """
        if self._store is None:
            return [own]
        return [self.hear(name, rank) for rank in range(self.num)]

    def hear(self, name: str, rank: int) -> str:
        """The text of a rank under a name, as soon as it has told it.

        Raises:
            RankStopped: another rank has stopped.
        """
        key = f"{name}/{rank}"
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL_SECONDS)
        text: str = self._store.get(key).decode()
        return text

    def check(self) -> None:
        """Refuse to go on without the others.

        Raises:
            RankStopped: another rank has stopped.
        """
        if self._stopped:
            raise RankStopped(self._stopped)

    def stop(self, error: BaseException) -> None:
        """Tell all ranks that this one stops, unless it does so because another one has stopped.

        Raises:
            RankStopped: another one has.
        """
        if self._store is None or isinstance(error, RankStopped):
            return
        deadline = time.monotonic() + GRACE_SECONDS
        if isinstance(error, RuntimeError):  # perhaps a collective of which a rank is gone
            while not self._stopped and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            self.check()
        self._end.set()
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        told = json.dumps({"rank": self.rank, "host": self.host, "message": text})
        self._stopped = text
        if self._store.compare_set(_STOPPED, "", told).decode() != told:
            self._store.add(_HEARD, 1)
        self._wait_for(_HEARD, self.num - 1)

    def close(self) -> None:
        """End the watch. The first rank, which may hold the store, waits for the others."""
        if self._store is None:
            return
        self._end.set()
        try:
            self._store.add(_CLOSED, 1)
            if self.is_main and not self._stopped:
                self._wait_for(_CLOSED, self.num)
        except RuntimeError:
            return  # the rank that holds the store was quicker

    def _wait_for(self, name: str, number: int) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while self._store.add(name, 0) < number and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        """Look whether another rank has stopped, and end this process if it does not end itself: a
        collective without all of its ranks may hang for ever."""
        while not self._end.wait(POLL_SECONDS):
            try:
                if not self._store.check([_STOPPED]):
                    continue
                told = load_json(self._store.get(_STOPPED), "what a rank told")
                message = f"rank {told['rank']} on {told['host']} stopped: {told['message']}"
                self._store.add(_HEARD, 1)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                message = f"rank {self.rank} on {self.host} has lost the first rank: {error}"
            self._stopped = message
            if not self._end.wait(GRACE_SECONDS):
                print(f"Error: {message}", file=sys.stderr, flush=True)
                os._exit(1)
            return


@contextmanager
def joined(
    accelerator: Accelerator, timeout: timedelta, *together: type[BaseException]
) -> Iterator[Ranks]:
    """The ranks of an accelerator. One that leaves the block by an exception ends all of them
    within seconds, and all show its message.

    Args:
        timeout: time within which all ranks must have come.
        together: exceptions that all ranks raise after the same step.

    Raises:
        RankStopped: another rank has stopped.
    """
    num = accelerator.num_processes
    if num == 1:
        yield Ranks()
        return
    rank = accelerator.process_index
    found = torch.distributed.rendezvous("env://", rank, num, timeout=timeout)
    store, _, _ = next(iter(found))
    # A process may train several times.
    store = torch.distributed.PrefixStore(f"semroute-{next(_numbers)}", store)
    ranks = Ranks(rank, num, store)
    try:
        yield ranks
    except together:
        raise
    except BaseException as error:
        ranks.stop(error)
        raise
    finally:
        ranks.close()
