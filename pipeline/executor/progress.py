"""Progress of writing shards: the events that a driver emits, and reporters that show them.

A reporter shows one line in a terminal or a notebook, a line now and then in a log, or JSON.
"""

import json
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from tqdm.auto import tqdm

from ...schemas.escaping import shown
from ...schemas.units import format_bytes
from ...schemas.verbosity import speaks

Style = Literal["auto", "json"]
LOG_SECONDS = 30.0
"""Minimum time between two lines of a log."""
VERBOSE_SECONDS = 5.0
"""The same with ``--verbose``."""
JSON_SECONDS = 1.0
"""Minimum time between two lines of JSON."""


@dataclass(frozen=True)
class ProgressEvent:
    """Something that happened while shards were written.

    Attributes:
        num_workers: Dask workers when they were last counted; 0 without Dask.
        num_errors: failed attempts so far.
    """

    num_workers: int
    num_errors: int


@dataclass(frozen=True)
class ShardsStarted(ProgressEvent):
    """The remaining shards are about to be written.

    Attributes:
        store: name of the store.
        shards: numbers of entries and rows of every shard of the store.
        remaining: shards to be written.
        started: time.perf_counter() when the run started, before its workers did.
    """

    store: str
    shards: Mapping[int, tuple[int, int]]
    remaining: tuple[int, ...]
    started: float


@dataclass(frozen=True)
class EntriesDone(ProgressEvent):
    """A shard in progress has come to so many entries."""

    shard: int
    num_entries: int


@dataclass(frozen=True)
class ShardWritten(ProgressEvent):
    """A shard and its receipt were written."""

    shard: int
    num_bytes: int


@dataclass(frozen=True)
class ShardFailed(ProgressEvent):
    """A shard was given up and quarantined."""

    shard: int
    error: BaseException


@dataclass(frozen=True)
class ShardsEnded(ProgressEvent):
    """No further event follows: all shards are over, or the run was stopped."""


Listener = Callable[[ProgressEvent], None]


def open_reporter(style: Style, unit: str) -> "ProgressReporter":
    """Listener that shows progress.

    Args:
        style: auto: a bar in a terminal or a notebook, else a line now and then on standard error;
            json: one object per line on standard output.
        unit: name of entries: captions, images.
    """
    if style == "json":
        return JsonReporter(unit)
    if speaks() == "quiet":
        return SilentReporter(unit)
    return BarReporter(unit) if _is_watched() else LogReporter(unit)


class ProgressReporter(ABC):
    """Counts what is done and shows it. Events may come from several threads."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self._lock = threading.Lock()
        self._run = ShardsStarted(0, 0, "", {}, (), 0.0)
        self._latest: ProgressEvent = self._run
        self._partial: dict[int, int] = {}  # shards in progress -> entries that are done
        self._over: set[int] = set()
        self._num_bytes = 0
        self._num_failed = 0

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            self._latest = event
            match event:
                case ShardsStarted():
                    self._run = event
                case EntriesDone(shard=shard) if shard not in self._over:
                    self._partial[shard] = event.num_entries
                case ShardWritten():
                    self._end_shard(event.shard)
                    self._num_bytes += event.num_bytes
                case ShardFailed():
                    self._end_shard(event.shard)
                    self._num_failed += 1
            if self._run.remaining:
                self._show(event)

    def facts(self) -> dict[str, Any]:
        """Everything that is known; plain JSON types."""
        shards = self._run.shards
        entries, rows = self._done()
        total_entries, total_rows = _sum(shards.values())
        elapsed = time.perf_counter() - self._run.started
        before = [shards[shard] for shard in shards.keys() - {*self._run.remaining}]
        entries_before, rows_before = _sum(before)
        new_entries, new_rows = entries - entries_before, rows - rows_before
        return {
            "store": self._run.store,
            "shards": len(before) + len(self._over) - self._num_failed,
            "shards_total": len(shards),
            self.unit: entries,
            f"{self.unit}_total": total_entries,
            "rows": rows,
            "rows_total": total_rows,
            f"{self.unit}_per_second": new_entries / elapsed,
            "rows_per_second": new_rows / elapsed,
            "bytes": self._num_bytes,
            "workers": self._latest.num_workers,
            "errors": self._latest.num_errors,
            "quarantined": self._num_failed,
            "seconds": elapsed,
            "eta_seconds": (total_rows - rows) * elapsed / new_rows if new_rows else None,
        }

    @abstractmethod
    def _show(self, event: ProgressEvent) -> None:
        """Show the facts after an event; called under the lock."""

    def _end_shard(self, shard: int) -> None:
        self._over.add(shard)
        self._partial.pop(shard, None)

    def _done(self) -> tuple[int, int]:
        """Entries and rows that are done; of a shard in progress, rows by its share of entries."""
        in_progress = {*self._run.remaining} - self._over
        entries = rows = 0
        for shard, (num_entries, num_rows) in self._run.shards.items():
            done = num_entries
            if shard in in_progress:
                done = min(self._partial.get(shard, 0), num_entries)
            entries += done
            rows += num_rows * done // max(1, num_entries)
        return entries, rows


class BarReporter(ProgressReporter):
    """A bar in a terminal or a notebook."""

    _bar: Any = None

    def _show(self, event: ProgressEvent) -> None:
        facts = self.facts()
        line = progress_line(facts, self.unit)
        if isinstance(event, ShardsStarted):
            self._bar = tqdm(
                desc=line,
                total=facts[f"{self.unit}_total"],
                initial=facts[self.unit],
                bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            )
        self._bar.set_description_str(line, refresh=False)
        self._bar.update(facts[self.unit] - self._bar.n)
        if isinstance(event, (ShardsStarted, ShardsEnded)):
            self._bar.refresh()
        if isinstance(event, ShardsEnded):
            self._bar.close()


class SilentReporter(ProgressReporter):
    """Shows nothing."""

    def _show(self, event: ProgressEvent) -> None:
        pass


class _LineReporter(ProgressReporter):
    """Lines: the first at once, then one after a pause, and one at the end."""

    _printed = 0.0

    def _show(self, event: ProgressEvent) -> None:
        now = time.perf_counter()
        is_due = now - self._printed >= self._pause()
        if is_due or isinstance(event, (ShardsStarted, ShardsEnded)):
            self._printed = now
            self._print(self.facts())

    @abstractmethod
    def _pause(self) -> float:
        """Seconds between two lines."""

    @abstractmethod
    def _print(self, facts: dict[str, Any]) -> None:
        """Print one line."""


class LogReporter(_LineReporter):
    """Lines of text on standard error."""

    def _pause(self) -> float:
        return VERBOSE_SECONDS if speaks() == "verbose" else LOG_SECONDS

    def _print(self, facts: dict[str, Any]) -> None:
        print(progress_line(facts, self.unit), file=sys.stderr, flush=True)


class JsonReporter(_LineReporter):
    """JSON objects on standard output, one per line."""

    def _pause(self) -> float:
        return JSON_SECONDS

    def _print(self, facts: dict[str, Any]) -> None:
        print(json.dumps(facts), flush=True)


def _sum(shards: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Entries and rows of some shards."""
    entries = rows = 0
    for num_entries, num_rows in shards:
        entries += num_entries
        rows += num_rows
    return entries, rows


def progress_line(facts: Mapping[str, Any], unit: str) -> str:
    """Progress in one line, the same in a terminal, a notebook, a log and ``semroute status``.

    Args:
        facts: as :meth:`ProgressReporter.facts` gives them.
        unit: name of entries.
    """
    parts = [
        f"{shown(facts['store'])}: {facts[unit]:,}/{facts[f'{unit}_total']:,} {unit}",
        f"{facts[f'{unit}_per_second']:,.1f} {unit}/s",
        f"{facts['shards']:,}/{facts['shards_total']:,} shards",
        f"{facts['rows_per_second']:,.0f} rows/s",
        format_bytes(facts["bytes"]),
    ]
    if facts["workers"]:
        parts.append(f"{facts['workers']} workers")
    for name in ("errors", "quarantined"):
        if facts[name]:
            parts.append(f"{facts[name]} {name}")
    if facts["eta_seconds"] is not None:
        parts.append(f"{timedelta(seconds=round(facts['eta_seconds']))} left")
    return ", ".join(parts)


def _is_watched() -> bool:
    """Whether somebody sees a bar: in a terminal or a notebook."""
    return sys.stderr.isatty() or tqdm.__module__ == "tqdm.notebook"
