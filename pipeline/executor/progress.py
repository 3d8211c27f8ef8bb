"""How far a run is: one line in a terminal or a notebook, lines in a log, or JSON for machines."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from tqdm.auto import tqdm

from ...schemas.units import format_bytes

Style = Literal["auto", "json"]
LOG_SECONDS = 30.0
"""Between lines where nobody watches a terminal."""
JSON_SECONDS = 1.0


@dataclass
class ProgressReporter:
    """Counts what was done and shows it, from several threads.

    Attributes:
        title: of the line.
        unit: what entries are called: captions, images.
        shards: shard -> its entries and rows.
        remaining: shards that this run is to write.
        style: auto: a bar in a terminal or a notebook, else a line now and then; json: an object a
            line on standard output.
        workers: how many there are.
        errors: attempts that failed.
    """

    title: str
    unit: str
    shards: dict[int, tuple[int, int]]
    remaining: list[int]
    style: Style = "auto"
    workers: Callable[[], int] = lambda: 0
    errors: Callable[[], int] = lambda: 0
    num_bytes: int = 0
    quarantined: int = 0
    _partial: dict[int, int] = field(default_factory=dict)
    _over: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _bar: Any = None
    _shown: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> "ProgressReporter":
        if self.remaining and self.style == "auto" and _is_watched():
            self._bar = tqdm(
                total=self._total()[0],
                initial=self._done()[0],
                unit=f" {self.unit}",
                desc=self.title,
                smoothing=0.1,
            )
        self._show(force=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._show(force=True)
            if self._bar is not None:
                self._bar.close()

    def advance(self, shard: int, entries: int) -> None:
        """So many entries of a shard at work are done."""
        with self._lock:
            if shard not in self._over:
                self._partial[shard] = entries
            self._show()

    def finish(self, shard: int, num_bytes: int | None) -> None:
        """A shard is over: written, with its bytes, or given up."""
        with self._lock:
            self._over.add(shard)
            self._partial.pop(shard, None)
            if num_bytes is None:
                self.quarantined += 1
            else:
                self.num_bytes += num_bytes
            self._show()

    def facts(self) -> dict[str, Any]:
        """The numbers; plain JSON types."""
        entries, rows = self._done()
        total_entries, total_rows = self._total()
        elapsed = time.perf_counter() - self._started
        before = [self.shards[s] for s in self.shards.keys() - {*self.remaining}]
        new_entries = entries - sum(e for e, _ in before)
        new_rows = rows - sum(r for _, r in before)
        left = total_rows - rows
        return {
            "store": self.title,
            "shards": len(before) + len(self._over) - self.quarantined,
            "shards_total": len(self.shards),
            self.unit: entries,
            f"{self.unit}_total": total_entries,
            "rows": rows,
            "rows_total": total_rows,
            f"{self.unit}_per_second": new_entries / elapsed,
            "rows_per_second": new_rows / elapsed,
            "bytes": self.num_bytes,
            "workers": self.workers(),
            "errors": self.errors(),
            "quarantined": self.quarantined,
            "seconds": elapsed,
            "eta_seconds": left * elapsed / new_rows if new_rows else None,
        }

    def _total(self) -> tuple[int, int]:
        return sum(e for e, _ in self.shards.values()), sum(r for _, r in self.shards.values())

    def _done(self) -> tuple[int, int]:
        """Entries and rows, those of shards at work by their share."""
        at_work = {*self.remaining} - self._over
        entries = rows = 0
        for shard, (num_entries, num_rows) in self.shards.items():
            done = (
                min(self._partial.get(shard, 0), num_entries) if shard in at_work else num_entries
            )
            entries += done
            rows += num_rows * done // max(1, num_entries)
        return entries, rows

    def _show(self, force: bool = False) -> None:
        if not self.remaining:
            return
        now = time.perf_counter()
        if self._bar is not None:
            facts = self.facts()
            self._bar.set_postfix_str(_describe(facts), refresh=False)
            self._bar.update(facts[self.unit] - self._bar.n)
            if force:
                self._bar.refresh()
            return
        pause = JSON_SECONDS if self.style == "json" else LOG_SECONDS
        if not force and now - self._shown < pause:
            return
        self._shown = now
        facts = self.facts()
        if self.style == "json":
            print(json.dumps(facts), flush=True)
            return
        eta = facts["eta_seconds"]
        print(
            f"{self.title}: {facts[self.unit]:,}/{facts[f'{self.unit}_total']:,} {self.unit}, "
            f"{facts[f'{self.unit}_per_second']:,.1f} {self.unit}/s, {_describe(facts)}"
            + ("" if eta is None else f", {timedelta(seconds=round(eta))} left"),
            file=sys.stderr,
            flush=True,
        )


def _describe(facts: dict[str, Any]) -> str:
    """What a line says beside entries, their rate and the time left."""
    parts = [
        f"{facts['shards']:,}/{facts['shards_total']:,} shards",
        f"{facts['rows_per_second']:,.0f} rows/s",
        format_bytes(facts["bytes"]),
    ]
    if facts["workers"]:
        parts.append(f"{facts['workers']} workers")
    for name in ("errors", "quarantined"):
        if facts[name]:
            parts.append(f"{facts[name]} {name}")
    return ", ".join(parts)


def _is_watched() -> bool:
    """A terminal, or a notebook."""
    return sys.stderr.isatty() or tqdm.__module__ == "tqdm.notebook"
