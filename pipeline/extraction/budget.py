"""Extraction with a disk budget: shards are written as runs come to them, and evicted behind the
slowest.

What is on disk follows from the positions of the runs alone (:class:`.Residents`), so nothing has
to be remembered: after any kill, on either side, the same rule applies to the same files.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas import (
    BUDGET,
    POSITION,
    FollowedRun,
    InputError,
    Receipt,
    RunPosition,
    RunRecord,
    StoreBudget,
    TrainConfig,
    parse,
    read_config,
)
from ...schemas.budget import check_order, order_fingerprint
from ...schemas.files import is_local, locate
from ...schemas.json_file import read_json
from ...schemas.units import format_bytes
from ..executor.base import Executor, Outcome
from ..executor.progress import JSON_SECONDS, LOG_SECONDS, Style
from ..store.budget.needs import ShardNeeds
from ..store.budget.schedule import Residents, merge
from ..store.budget.shards import enter_budget, evict, on_disk, other_bytes, remove_leftovers
from ..store.documents import ShardTooLargeError, write_contract
from ..store.features import FeatureStore
from ..store.lock import is_dead, read_driver
from ..store.shard_file import CRC_BYTES
from .driver import ExtractionError, explaining, quarantine, reason, report_dashboard, sweep
from .requests import ExtractRequest

if TYPE_CHECKING:
    from .features import FeaturePlan

LOOK_SECONDS = 0.1
"""Pause between two looks at the positions of runs."""
BUDGET_BYTES = 8_000
"""Bytes that ``budget.json`` and the lock may take."""
CHUNK_BYTES = 16 + CRC_BYTES
"""Bytes of a chunk besides its rows: in the index, and of its checksum."""
MARGIN = 1.25
"""The size of a shard that was never written is at most this many times that of the others, per
row; one that turns out larger is written once there is room for it."""


def read_runs(request: ExtractRequest) -> tuple[TrainConfig, ...]:
    """Configurations of the runs that a request names, by their YAML files or run directories.

    Raises:
        InputError: one cannot be followed, or two have the same run directory.
    """
    if request.budget is None:
        return ()
    if not is_local(request.target):
        raise InputError(
            f"--budget: {request.target} is in an object store; expected a folder, whose disk has "
            "a limit"
        )
    configs = []
    for path in map(Path, request.runs):
        if (path / "run.json").exists():
            file = path / "run.json"
            config = parse(RunRecord, read_json(file), str(file)).config
        else:
            config = read_config(path)
        check_order(config, str(request.target))
        known = [config.features, *(source.features for source in config.data.mixture)]
        if request.target.resolve() not in [locate(name).resolve() for name in known]:
            raise InputError(
                f"--for {path}: the run reads {', '.join(known)}, not {request.target}"
            )
        configs.append(config)
    outputs = [Path(config.output).resolve() for config in configs]
    if len({*outputs}) < len(outputs):
        raise InputError("--for: two runs have the same output; name each run once")
    return tuple(configs)


@dataclass
class Follower:
    """A run whose reading is followed.

    Attributes:
        output: its directory.
        needs: shards that it needs, by position.
        order: fingerprint of the order that was planned.
        step, steps: done, and to be done.
        ended: whether its last checkpoint is written.
        held: shards whose files it holds open.
    """

    output: Path
    needs: ShardNeeds
    order: str
    steps: int
    step: int = 0
    ended: bool = False
    held: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: TrainConfig, store: FeatureStore) -> "Follower":
        needs, output = ShardNeeds.of(store, config), Path(config.output).resolve()
        return cls(output, needs, order_fingerprint(config), config.steps)

    @property
    def position(self) -> int:
        """Samples that it has read."""
        return self.step * self.needs.batch_size

    def look(self, store: Path) -> None:
        """Read how far the run is; one that was not started is at its beginning.

        Args:
            store: the folder whose shards it reads.

        Raises:
            InputError: it reads in another order than was planned.
        """
        try:
            place = self.output / POSITION
            found = parse(RunPosition, read_json(place), str(place))
        except FileNotFoundError:
            return
        if found.order != self.order:
            raise InputError(
                f"{self.output} reads in another order than --for says: its seed, data or "
                "validation differ. Name the run directory instead, once it is there, or the YAML "
                "file that the run is trained by"
            )
        self.step, self.ended = found.step, found.ended and found.step >= self.steps
        driver = read_driver(self.output)
        lives = driver is not None and not is_dead(driver)  # its files are closed otherwise
        self.held = frozenset(
            shard
            for path, shards in (found.open_shards.items() if lives else ())
            if Path(path).resolve() == store.resolve()
            for shard in shards
        )

    def record(self, residents: Residents) -> FollowedRun:
        absent = np.ones(len(residents.sizes), bool)
        absent[[*residents.on_disk]] = False
        ahead = self.needs.steps_before(self.position, absent, residents.most())
        return FollowedRun(
            output=str(self.output),
            order=self.order,
            step=self.step,
            steps=self.steps,
            steps_ahead=ahead,
            ended=self.ended,
        )


def follow_runs(
    plan: "FeaturePlan",
    store: FeatureStore,
    configs: Sequence[TrainConfig],
    budget: int,
    executor: Executor,
    report: Callable[[str], None],
    progress: Style,
) -> None:
    """Write shards as runs come to them, until all runs have ended.

    Args:
        budget: bytes that all files of the store may take.

    Raises:
        InputError: a run cannot be followed, or the budget is too small for it.
        ExtractionError: a shard failed, or the disk is full.
        Interrupted: Ctrl-C.
    """
    if not store.has_budget:
        enter_budget(store, StoreBudget(num_bytes=budget, kept=[], runs=[]))
    sweep(store, report)
    remove_leftovers(store)
    followers = [Follower.of(config, store) for config in configs]
    schedule = Schedule(plan, store, followers, budget, Announcer(store, progress, report))
    schedule.begin(report)
    executor.limit(store.manifest.layout.num_shards)
    report_dashboard(executor, report)
    with explaining(store, report):
        function: Callable[..., Any] = plan.function
        outcomes: Iterator[Outcome[Receipt]] = executor.run(
            schedule, function, schedule.task, on_progress=lambda *_: None
        )
        for shard, outcome in outcomes:
            schedule.end(shard, outcome)
    schedule.announce(force=True)
    report(
        f"all runs that {store.path} follows have ended; {schedule.num_written:,} shards were "
        f"written, {schedule.num_again:,} of them again; waited {schedule.waited_seconds:.1f} s "
        "for runs"
    )


@dataclass
class Schedule:
    """Shards to write, as an iterator without end while runs go on; None while there is none.

    Attributes:
        num_written, num_again: shards written by this process, and how many of them had been
            written before.
        waited_seconds: time in which nothing was to be written.
    """

    plan: "FeaturePlan"
    store: FeatureStore
    followers: list[Follower]
    budget: int
    announcer: "Announcer"
    num_written: int = 0
    num_again: int = 0
    waited_seconds: float = 0.0
    kept: frozenset[int] = frozenset()
    residents: Residents = field(init=False)
    _known: dict[int, int] = field(default_factory=dict)  # shard -> bytes
    _proved: set[int] = field(default_factory=set)  # shards with a receipt
    _looked: float = 0.0
    _idle_since: float | None = None

    def begin(self, report: Callable[[str], None]) -> None:
        """Look at files and runs.

        Raises:
            InputError: the budget is too small.
        """
        self.kept = frozenset().union(*(follower.needs.kept for follower in self.followers))
        receipts = self.store.receipts()
        self._known = {
            shard: sum(file.num_bytes for file in receipt.files.values())
            for shard, receipt in receipts.items()
        }
        self._proved = {*receipts}
        room = self.budget - other_bytes(self.store) - BUDGET_BYTES
        self.residents = Residents(room, self._sizes(), on_disk(self.store))
        self._look()
        needed = self._needed()
        if needed > room:
            raise InputError(
                f"--budget {format_bytes(self.budget)} is too small: shards that are mixed at a "
                f"time, and {len(self.kept)} that are always kept (of the null caption and of "
                f"validation samples), take up to {format_bytes(needed)}, and other files of "
                f"{self.store.path} {format_bytes(self.budget - room)}. Give "
                f"{format_bytes(int(1.05 * (needed + self.budget - room)))} or more, or take a "
                "smaller data.window, fewer validation.num_samples or a smaller --shard-size"
            )
        report(
            f"budget {format_bytes(self.budget)}, of which runs need {format_bytes(needed)} at a "
            f"time; following {', '.join(str(follower.output) for follower in self.followers)}"
        )
        self._make_room()

    def __iter__(self) -> Iterator[int | None]:
        while not all(follower.ended for follower in self.followers):
            yield self._next()

    def task(self, shard: int) -> tuple[Any, ...]:
        """Arguments of the function that writes a shard."""
        job, task = self.plan.task(shard)
        return job, replace(task, max_bytes=self.residents.in_flight[shard])

    def end(self, shard: int, outcome: Receipt | BaseException) -> None:
        """Take the outcome of a shard.

        Raises:
            ExtractionError: it failed.
        """
        self.residents.in_flight.pop(shard)
        if isinstance(outcome, ShardTooLargeError):
            self._known[shard] = outcome.num_bytes
        elif isinstance(outcome, BaseException):
            self.store.write_quarantine(quarantine(shard, self.plan.packing, outcome))
            raise ExtractionError(
                f"shard {shard} failed, and runs wait for it: {reason(outcome)}. It is listed with "
                f"its captions in {self.store.path / 'quarantine'}. Remove the cause and rerun the "
                "same command to resume."
            ) from outcome
        else:
            self.num_written += 1
            self.num_again += shard in self._proved
            self._proved.add(shard)
            self._known[shard] = sum(file.num_bytes for file in outcome.files.values())
            self.residents.on_disk[shard] = self._known[shard]
        self.residents.sizes = self._sizes()
        self.announce()

    def announce(self, *, force: bool = False) -> None:
        """Write ``budget.json`` and tell who waits for whom, now and then."""
        if not (force or self.announcer.is_due()):
            return
        waits_for, seconds = None, self.waited_seconds
        if self._idle_since is not None:
            waits_for = str(min(self._running(), key=lambda f: f.position).output)
            seconds += time.monotonic() - self._idle_since
        runs = [follower.record(self.residents) for follower in self.followers]
        budget = StoreBudget(
            num_bytes=self.budget,
            kept=sorted(self.kept),
            runs=runs,
            waits_for=waits_for,
            waited_seconds=seconds,
        )
        self.announcer.tell(budget, self.residents, self.num_written, self.num_again)

    def _running(self) -> list[Follower]:
        return [f for f in self.followers if not f.ended] or self.followers

    def _next(self) -> int | None:
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()
        elif self._idle_since is not None:
            return None
        turn = self.residents.turn(self._wanted())
        if turn.evict:
            self._evict(turn.evict)
        is_idle = turn.write is None and not self.residents.in_flight
        self._note_idle(is_idle)
        if is_idle and not self.residents.held_bytes:
            self._check_room()
        if turn.write is not None:
            self.residents.in_flight[turn.write] = int(self.residents.sizes[turn.write])
        self.announce()
        return turn.write

    def _look(self) -> None:
        self._looked = time.monotonic()
        for follower in self.followers:
            follower.look(self.store.path)
        held = frozenset().union(*(follower.held for follower in self.followers))
        self.residents.held = held & {*range(len(self.residents.sizes))}

    def _wanted(self) -> list[int]:
        runs = [(f.needs, f.position) for f in self.followers if not f.ended]
        return merge(self.kept, runs, self.residents.most())

    def _check_room(self) -> None:
        """Refuse to wait for a run that waits for more shards than there is room for."""
        slowest = min(self._running(), key=lambda follower: follower.position)
        starts, shards = slowest.needs.ahead(slowest.position, 1)
        needed = {*self.kept, *shards[starts == starts[:1]].tolist()}
        absent = needed - self.residents.on_disk.keys()
        if absent and not slowest.ended:
            raise InputError(
                f"{slowest.output} needs {len(needed)} shards at step {slowest.step:,}, of which "
                f"{len(absent)} have no room in {format_bytes(self.budget)}: rerun the same "
                "command with a larger --budget"
            )

    def _evict(self, shards: Sequence[int]) -> None:
        evict(self.store, shards)
        for shard in shards:
            del self.residents.on_disk[shard]

    def _make_room(self) -> None:
        """Evict what is over the budget, which may be smaller than it was."""
        wanted = self._wanted()
        place = {shard: number for number, shard in enumerate(wanted)}
        last = sorted(self.residents.on_disk, key=lambda s: place.get(s, len(place)))
        over = []
        excess = self.residents.num_bytes - self.residents.room
        while excess > 0:
            over.append(last.pop())
            excess -= self.residents.on_disk[over[-1]]
        self._evict(over)

    def _note_idle(self, is_idle: bool) -> None:
        now = time.monotonic()
        if is_idle and self._idle_since is None:
            self._idle_since = now
        elif not is_idle and self._idle_since is not None:
            self.waited_seconds += now - self._idle_since
            self._idle_since = None

    def _sizes(self) -> np.ndarray:
        """Bytes of each shard, by its receipt, or the most that it may take: int64 ``[shards]``."""
        rows, layout = self._rows, self.store.manifest.layout
        known = np.array([*self._known], np.int64)
        sizes = np.array([*self._known.values()], np.int64)
        if len(known):
            per_row = MARGIN * float((sizes / rows[known]).max())
        else:
            bytes_per_row = self.store.bytes_per_row()
            margin = 1.0 if self.store.manifest.codec.name == "bf16" else MARGIN
            per_row = margin * bytes_per_row * self.plan.bits_per_value / 16
        num_chunks = layout.rows_per_shard // layout.rows_per_chunk
        index = len(self.store.stored_arrays) * (num_chunks * CHUNK_BYTES + CRC_BYTES)
        found = np.ceil(rows * per_row).astype(np.int64) + index
        found[known] = sizes
        return found

    @cached_property
    def _rows(self) -> np.ndarray:
        """Rows of each shard, int64 ``[shards]``."""
        return np.array([num_rows for _, num_rows in self.plan.packing.work().values()], np.int64)

    def _needed(self) -> int:
        """Bytes that shards of any one run take at a time, with those that are always kept."""
        sizes = self.residents.sizes
        largest = max(follower.needs.largest(sizes) for follower in self.followers)
        return int(sizes[sorted(self.kept)].sum()) + largest


@dataclass
class Announcer:
    """Tells people, and other processes, who waits for whom."""

    store: FeatureStore
    style: Style
    report: Callable[[str], None]
    _started: float = field(default_factory=time.monotonic)
    _written: float = 0.0
    _shown: float = 0.0
    _last: str | None = None

    def is_due(self) -> bool:
        return time.monotonic() - self._written >= JSON_SECONDS

    def tell(
        self, budget: StoreBudget, residents: Residents, num_written: int, num_again: int
    ) -> None:
        """Write the document, and a line of progress if one is due."""
        now = self._written = time.monotonic()
        write_contract(self.store.path / BUDGET, budget)
        state = {
            "store": self.store.path.name,
            "shards": len(residents.on_disk),
            "shards_total": len(residents.sizes),
            "written": num_written,
            "written_again": num_again,
            "bytes": sum(residents.on_disk.values()),
            "budget_bytes": budget.num_bytes,
            "waits_for": budget.waits_for,
            "waited_seconds": budget.waited_seconds,
            "runs": [run.model_dump(include=_TOLD) for run in budget.runs],
            "seconds": now - self._started,
        }
        if self.style == "json":
            print(json.dumps(state), flush=True)
        elif now - self._shown >= LOG_SECONDS or budget.waits_for != self._last:
            self._shown, self._last = now, budget.waits_for
            print(_line(state), file=sys.stderr, flush=True)


_TOLD = {"output", "step", "steps", "steps_ahead", "ended"}


def _line(state: dict[str, Any]) -> str:
    """The state in words."""
    parts = [
        f"{state['store']}: {state['shards']:,} of {state['shards_total']:,} shards on disk, "
        f"{format_bytes(state['bytes'])} of {format_bytes(state['budget_bytes'])}; "
        f"{state['written']:,} written, {state['written_again']:,} of them again"
    ]
    for run in state["runs"]:
        where = "ended" if run["ended"] else f"{run['steps_ahead']:,} steps ahead of it are on disk"
        parts.append(f"{run['output']} at step {run['step']:,} of {run['steps']:,}, {where}")
    if state["waits_for"] is not None:
        waited = timedelta(seconds=round(state["waited_seconds"]))
        parts.append(f"waits for {state['waits_for']} ({waited} so far)")
    return "; ".join(parts)
