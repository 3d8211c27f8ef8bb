"""The position of a run, for ``status`` and for extraction that follows it: ``position.json`` in
its directory."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tqdm.auto import tqdm

from ...pipeline.store.documents import read_budget, write_contract
from ...pipeline.store.lock import is_dead, read_driver
from ...pipeline.store.order.dataset import StorePair
from ...schemas import POSITION, InputError, RunPosition, TrainConfig
from ...schemas.budget import check_order, order_fingerprint

if TYPE_CHECKING:
    from ...pipeline.store.budget.followed import FollowedFeatureStore
    from ..data.loader import PackedLoader

PUBLISH_SECONDS = 0.1
"""Pause between two looks whether the position has changed, where extraction follows it."""
FETCHED_SECONDS = 1.0
"""The same where stores are fetched, which nobody waits for."""
TELL_SECONDS = 30.0
"""A wait is reported after so long, and again and again."""


def followed_stores(pairs: Sequence[StorePair]) -> "list[FollowedFeatureStore]":
    """Stores of a run that have a disk budget."""
    found = [pair.features for pair in pairs if pair.features.has_budget]
    return cast("list[FollowedFeatureStore]", found)


def check_followed(config: TrainConfig, pairs: Sequence[StorePair]) -> None:
    """Refuse a run whose shards nobody would write.

    Raises:
        InputError: it reads in random order, or extraction does not follow it.
    """
    for store in followed_stores(pairs):
        check_order(config, str(store.path))
        budget = read_budget(store.path)
        runs = {} if budget is None else {run.output: run.order for run in budget.runs}
        output = str(Path(config.output).resolve())
        followed = ", ".join(runs) or "no run"
        if output not in runs:
            raise InputError(
                f"{store.path} has a disk budget and follows {followed}, not {output}: rerun "
                "semroute extract with --for the YAML file of this run too"
            )
        if runs[output] != order_fingerprint(config):
            raise InputError(
                f"{store.path} follows {output}, but with another seed, data or validation than "
                "this configuration has: rerun semroute extract with --for this one"
            )


@contextmanager
def publishing(
    config: TrainConfig, loader: "PackedLoader", step: Callable[[], int]
) -> Iterator[None]:
    """Publish the position of a run while the block runs, and its end after it; nothing if no
    store is fetched or has a disk budget.

    Args:
        loader: whose stores the run reads.
        step: steps done.
    """
    stores = followed_stores(loader.pairs)
    if not stores and loader.fetched() is None:
        yield
        return
    place, order = Path(config.output) / POSITION, order_fingerprint(config)
    waits, pause = _Waits(stores), PUBLISH_SECONDS if stores else FETCHED_SECONDS

    def position(*, ended: bool = False, leaves: bool = False) -> RunPosition:
        return RunPosition(
            step=step(),
            steps=config.steps,
            order=order,
            ended=ended,
            waits_for=waits.shards,
            open_shards={} if leaves else open_shards(stores),
            waiting_since=waits.since,
            waited_seconds=round(loader.wait_seconds, 3),
            fetched=loader.fetched(),
        )

    last = position()
    write_contract(place, last)
    end = threading.Event()

    def publish() -> None:
        nonlocal last
        while not end.wait(pause):
            waits.look(step())
            now = position()
            if now != last:
                write_contract(place, now)
                last = now

    thread = threading.Thread(target=publish, daemon=True, name="semroute-position")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        waits.clear()
        write_contract(place, position(ended=step() >= config.steps, leaves=True))


def open_shards(stores: "Sequence[FollowedFeatureStore]") -> dict[str, list[int]]:
    """Path of a store -> shards whose files are open, once those that were evicted are closed."""
    for store in stores:
        store.forget_evicted()
    return {
        str(store.path): sorted({s for array in store.arrays.values() for s in array.open_shards()})
        for store in stores
    }


class _Waits:
    """What steps wait for, and since when; long waits are reported.

    Attributes:
        shards: path of a store -> shards.
        since: time at which the wait began, UTC.
    """

    def __init__(self, stores: "Sequence[FollowedFeatureStore]") -> None:
        self.stores = stores
        self.clear()

    def clear(self) -> None:
        self.shards: dict[str, list[int]] = {}
        self.since: str | None = None
        self._began = self._told = time.monotonic()
        self._step = -1

    def look(self, step: int) -> None:
        """Take what reading waits for at a step. Reading ahead waits too, which costs nothing, so a
        wait counts from the last step on."""
        now = time.monotonic()
        self.shards = {str(s.path.resolve()): s.waits_for for s in self.stores if s.waits_for}
        if not self.shards or step != self._step:
            self._began = self._told = now
            self._step = step
        self.since = None
        if self.shards:
            began = datetime.now(UTC).timestamp() - (now - self._began)
            self.since = datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds")
        if self.shards and now - self._told >= TELL_SECONDS:
            self._told = now
            tqdm.write(self._line(now - self._began), file=sys.stderr)

    def _line(self, seconds: float) -> str:
        parts = []
        for store in self.stores:
            if waits_for := store.waits_for:
                driver = read_driver(store.path)
                who = "extraction is not running: rerun semroute extract"
                if driver is not None and not is_dead(driver):
                    budget = read_budget(store.path)
                    who = f"process {driver.pid} on {driver.host} extracts"
                    if budget is not None and budget.waits_for is not None:
                        who += f", and waits for {budget.waits_for}"
                parts.append(f"shard {waits_for[0]} of {store.path} ({who})")
        return f"step {self._step + 1} has waited {seconds:.0f} s for {'; '.join(parts)}"
