"""Fill a store: run the shards that remain, show it, quarantine what fails, finish."""

import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..schemas import InputError, Provenance, Quarantine, Receipt
from .cluster import DiskFullError, Interrupted, num_cpus, run
from .layout import Packing, format_bytes
from .store import FeatureStore, LatentStore

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


def fill(
    store: FeatureStore | LatentStore,
    remaining: Sequence[int],
    function: Callable[..., Receipt],
    arguments: Callable[[int], tuple[Any, ...]],
    packing: Packing,
    *,
    workers: int,
    unit: str,
    report: Callable[[str], None],
) -> None:
    """Run the remaining shards and finish the store.

    Args:
        function: writes one shard and its receipt, and returns the receipt; importable by name.
        arguments: shard -> what the function is called with.
        workers: as for :func:`semroute.pipeline.cluster.run`.
        unit: what entries are called in the progress bar.
        report: takes one line of text at a time.

    Raises:
        ExtractionError: shards failed, or the disk is full; all others are written.
        Interrupted: Ctrl-C.
    """
    sizes = {shard: len(packing.entries(shard)) for shard in range(packing.layout.num_shards)}
    total = sum(sizes.values())
    written, warnings = _Tally(), set()
    with tqdm(
        total=total,
        initial=total - sum(sizes[shard] for shard in remaining),
        unit=f" {unit}",
        desc=store.path.name,
        smoothing=0.1,
        disable=not remaining,
    ) as bar:
        failed: dict[int, BaseException] = {}
        partial: dict[int, int] = {}  # entries done of shards at work
        over: set[int] = set()
        finished = bar.n

        def show(shard: int, done: int) -> None:
            if shard not in over:
                partial[shard] = done
            bar.update(max(0, finished + sum([*partial.values()]) - bar.n))

        outcomes = run(remaining, function, arguments, workers=workers, on_progress=show)
        try:
            for shard, outcome in outcomes:
                if isinstance(outcome, Receipt):
                    written.add(outcome)
                    warnings.update(outcome.warnings)
                else:
                    failed[shard] = outcome
                    store.write_quarantine(
                        Quarantine(
                            shard=shard,
                            entries=list(packing.entries(shard)),
                            reason=f"{type(outcome).__name__}: {outcome}",
                            traceback="".join(traceback.format_exception(outcome)),
                        )
                    )
                over.add(shard)
                partial.pop(shard, None)
                finished += sizes[shard]
                bar.update(finished + sum([*partial.values()]) - bar.n)
                bar.set_postfix_str(written.describe(len(failed)))
        except DiskFullError as error:
            raise ExtractionError(
                f"the disk of {store.path} is full ({error.strerror}). What is written is whole "
                f"and kept: {len(store.remaining())} of {packing.layout.num_shards} shards remain. "
                "Free some space and run the same command again."
            ) from error
        except (Interrupted, KeyboardInterrupt):
            bar.close()
            report(
                f"stopped: {len(store.remaining())} of {packing.layout.num_shards} shards remain; "
                "the same command continues"
            )
            raise
    for warning in sorted(warnings):
        report(f"warning: {warning}")
    if failed:
        shown = "\n  ".join(
            f"shard {shard}: {type(error).__name__}: {error}"
            for shard, error in sorted(failed.items())[:5]
        )
        raise ExtractionError(
            f"{len(failed)} of {packing.layout.num_shards} shards failed and are listed with their "
            f"entries in {store.path / 'quarantine'}:\n  {shown}\nAll others are written. Mend the "
            "cause and run the same command again."
        )
    if not store.is_complete:
        store.finish()
    report(written.summary(store))


@dataclass
class _Tally:
    """What was written in this run."""

    started: float = field(default_factory=time.perf_counter)
    rows: int = 0
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        self.rows += receipt.num_rows
        self.num_bytes += sum(file.num_bytes for file in receipt.files.values())
        for name, seconds in receipt.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def describe(self, num_failed: int) -> str:
        rate = self.rows / (time.perf_counter() - self.started)
        failed = f", {num_failed} failed" if num_failed else ""
        return f"{rate:,.0f} rows/s, {format_bytes(self.num_bytes)}{failed}"

    def summary(self, store: FeatureStore | LatentStore) -> str:
        elapsed = time.perf_counter() - self.started
        text = f"{store.path} is complete: {format_bytes(store.num_bytes())}"
        if not self.rows:
            return f"{text}; nothing was left to do"
        where = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{text}; {self.rows:,} rows in {elapsed:.1f} s (in workers: {where})"


def check_space(target: Path, needed: int, force: bool) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        needed: bytes.
        force: begin all the same.
    """
    existing = next(p for p in (target.resolve(), *target.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free and not force:
        raise InputError(
            f"{target} needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free. "
            "Take fewer --layers or another disk, or begin all the same with --force."
        )


def num_workers(workers: int | None, gpus: int) -> int:
    """The number asked for, or one a GPU, or one a CPU core up to 4."""
    return workers if workers is not None else gpus or min(num_cpus(), 4)


def name_workers(workers: int) -> str:
    """How a number of workers is put to people."""
    return {0: "in this process", 1: "1 worker"}.get(workers, f"{workers} workers")


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
