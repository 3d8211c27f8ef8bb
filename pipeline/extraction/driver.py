"""Fill a store: run the shards that remain, show it, quarantine what fails, finish."""

import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...schemas import InputError, Provenance, Quarantine, Receipt
from ...schemas.files import is_local
from ...schemas.units import format_bytes
from ..executor.base import Deferred, DiskFullError, Executor, Interrupted
from ..executor.connect import connect
from ..executor.progress import ProgressReporter, Style
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.layout import Packing
from ..store.lock import LockedError, locked

_LIBRARIES = (
    "semroute",
    "torch",
    "transformers",
    "tokenizers",
    "zarr",
    "numcodecs",
    "numpy",
    "dask",
)
"""Whose versions are recorded with a store."""


class ExtractionError(InputError):
    """Some shards could not be written; the store keeps all others."""


@contextmanager
def exclusive_writer(
    store: Path,
    cluster: str,
    workers: int | None,
    report: Callable[[str], None],
    *,
    gpus: int | None = None,
) -> Iterator[Executor]:
    """Be the driver of a store, on the cluster that was named; its workers end with the block.

    Args: as for :func:`semroute.pipeline.executor.connect.connect`.

    Raises:
        LockedError: another process fills this store.
        InputError: no such cluster.
    """
    hint = f" semroute status {store} shows it."
    with locked(store, report, hint) as lock, connect(cluster, workers, gpus) as executor:
        executor.stop = lock.stop
        try:
            yield executor
        except Interrupted as error:
            if not lock.lost:
                raise
            raise LockedError(
                f"another driver took this one for dead and has taken over {store}; semroute "
                f"status {store} shows it"
            ) from error


def run_shards(
    store: FeatureStore | LatentStore,
    remaining: Sequence[int],
    function: Callable[..., Receipt | Deferred[Receipt]],
    arguments: Callable[[int], tuple[Any, ...]],
    packing: Packing,
    *,
    executor: Executor,
    unit: str,
    report: Callable[[str], None],
    style: Style = "auto",
) -> None:
    """Run the remaining shards and finish the store.

    Args:
        function: encodes one shard, then writes it and its receipt, which is the result; importable
            by name.
        arguments: shard -> what the function is called with.
        executor: calls it.
        unit: what entries are called in the progress line.
        report: takes one line of text at a time.
        style: of the progress line.

    Raises:
        ExtractionError: shards failed, or the disk is full; all others are written.
        Interrupted: Ctrl-C.
        ClusterLostError: the scheduler is gone.
    """
    meter = ProgressReporter(
        store.path.name,
        unit,
        packing.work(),
        list(remaining),
        style,
        workers=lambda: executor.num_workers,
        errors=lambda: executor.num_errors,
    )
    written, warnings = _Tally(), Counter[str]()
    failed: dict[int, BaseException] = {}
    _sweep(store, report)
    dashboard = executor.dashboard() if remaining else ""
    if dashboard:
        report(f"Dask's dashboard: {dashboard}")
    try:
        with meter:
            outcomes = executor.run(remaining, function, arguments, on_progress=meter.advance)
            for shard, outcome in outcomes:
                if isinstance(outcome, Receipt):
                    written.add(outcome)
                    warnings.update(outcome.warnings)
                    meter.finish(shard, sum(file.num_bytes for file in outcome.files.values()))
                else:
                    failed[shard] = outcome
                    entries = list(packing.entries(shard))
                    store.write_quarantine(_quarantine(shard, entries, outcome))
                    meter.finish(shard, None)
    except DiskFullError as error:
        raise ExtractionError(
            f"the disk of {store.path} is full ({error.strerror}). What is written is whole "
            f"and kept: {len(store.remaining())} of {packing.layout.num_shards} shards remain. "
            "Free some space and run the same command again."
        ) from error
    except (Interrupted, KeyboardInterrupt):
        report(
            f"stopped: {len(store.remaining())} of {packing.layout.num_shards} shards remain; "
            "the same command continues"
        )
        raise
    for warning, num in sorted(warnings.items()):
        report(f"warning, of {num} of {packing.layout.num_shards} shards: {warning}")
    if failed:
        shown = "\n  ".join(
            f"shard {shard}: {_reason(error)}" for shard, error in sorted(failed.items())[:5]
        )
        raise ExtractionError(
            f"{len(failed)} of {packing.layout.num_shards} shards failed and are listed with their "
            f"entries in {store.path / 'quarantine'}:\n  {shown}\nAll others are written. Mend the "
            "cause and run the same command again."
        )
    if not store.is_complete:
        _sweep(store, report)
        store.finish()
    report(written.summary(store))


def _sweep(store: FeatureStore | LatentStore, report: Callable[[str], None]) -> None:
    left = store.sweep()
    if left:
        report(
            f"{len(left)} files that were being written when their writer was killed are removed: "
            f"{format_bytes(sum(left))}"
        )


def _quarantine(shard: int, entries: list[int], error: BaseException) -> Quarantine:
    trace = "".join(traceback.format_exception(error))
    return Quarantine(shard=shard, entries=entries, reason=_reason(error), traceback=trace)


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return (
            "every worker that took it died: out of memory, or killed by the batch system? Its "
            "captions are listed beside; smaller --batch-tokens take less memory"
        )
    return f"{type(error).__name__}: {error}"


@dataclass
class _Tally:
    """What was written in this run."""

    started: float = field(default_factory=time.perf_counter)
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        self.rows += receipt.num_rows
        for name, seconds in receipt.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def summary(self, store: FeatureStore | LatentStore) -> str:
        elapsed = time.perf_counter() - self.started
        text = f"{store.path} is complete: {format_bytes(store.num_bytes())}"
        if not self.rows:
            return f"{text}; nothing was left to do"
        where = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{text}; {self.rows:,} rows in {elapsed:.1f} s (in workers: {where})"


def check_space(target: Path, needed: int, force: bool) -> None:
    """Refuse to begin what the disk cannot hold. Of an object store nothing is asked.

    Args:
        needed: bytes.
        force: begin all the same.
    """
    if not is_local(target):  # an object store tells no end
        return
    existing = next(p for p in (target.resolve(), *target.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free and not force:
        raise InputError(
            f"{target} needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free. "
            "Take fewer --layers or another disk, or begin all the same with --force."
        )


def provenance(source: str, model: str) -> Provenance:
    """Who made a store, of what, when, and with which libraries."""
    return Provenance(
        source=source,
        model=model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )


def library_versions() -> dict[str, str]:
    """Versions of what decides stored numbers, for the record."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
