"""The way of every job that writes a store: lock, plan, create | append | resume, run, finish."""

import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa

from ...schemas import FeatureManifest, InputError, Provenance, Quarantine, Receipt
from ...schemas.escaping import shown, without_secrets
from ...schemas.files import is_local
from ...schemas.units import format_bytes
from ..executor.base import Deferred, DiskFullError, Executor, Interrupted
from ..executor.connect import connect
from ..executor.progress import (
    EntriesDone,
    Listener,
    ProgressEvent,
    ShardFailed,
    ShardsEnded,
    ShardsStarted,
    ShardWritten,
    Style,
    open_reporter,
)
from ..executor.workers import Workers, inspect_workers
from ..store.base import Store
from ..store.conditioning import ConditioningStore
from ..store.documents import MANIFEST, StoreError, remove_partial_files
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.layout import Packing
from ..store.lock import LockedError, locked
from .append import added_bytes, append
from .requests import WriteRequest

S = TypeVar("S", FeatureStore, LatentStore, ConditioningStore)
_LIBRARIES = (
    "semroute",
    "torch",
    "transformers",
    "diffusers",
    "tokenizers",
    "zarr",
    "numcodecs",
    "numpy",
    "dask",
)
"""Libraries whose versions are recorded with a store."""


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
    """Hold the lock of a store and an executor on the named cluster; its workers end with the
    block.

    Args: as for :func:`semroute.pipeline.executor.connect.connect`.

    Raises:
        LockedError: another process writes this store.
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
            if is_local(store) and not store.exists():
                raise _gone(store) from error
            raise LockedError(
                f"another driver took this one for dead and has taken over {store}; semroute "
                f"status {store} shows it"
            ) from error


@dataclass(frozen=True, kw_only=True)
class StorePlan(ABC, Generic[S]):
    """A store to be written: everything about it that is known before its first shard.

    Attributes:
        path: where it is, or will be.
        existing: the store there, finished or not; None: a new one is created.
        manifest: as it will be.
        packing: which entry goes into which shard.
    """

    unit: ClassVar[str]
    """Name of entries in the progress line."""
    path: Path
    existing: S | None
    manifest: Any
    packing: Packing

    def settle(self, executor: Executor, report: Callable[[str], None]) -> Self:
        """The plan with what only a worker can tell."""
        return self

    @abstractmethod
    def tables(self) -> dict[str, pa.Table]:
        """All rows of the store's tables, by name without ``.parquet``."""

    @abstractmethod
    def new_bytes(self) -> int:
        """Bytes that shards which are not there yet will take, about."""

    @abstractmethod
    def create(self) -> S:
        """Create the store, without a shard."""

    def prepare(self, store: S) -> S:
        """The store, told what it needs to know while it is written."""
        return store

    def fill(
        self, store: S, executor: Executor, report: Callable[[str], None], progress: Style
    ) -> None:
        """Write all shards that remain, and finish the store. Errors as for :func:`run_shards`."""
        remaining = store.remaining()
        executor.limit(len(remaining))
        report(
            f"{self.describe()}; shards: {self.packing.layout.num_shards}, to do: "
            f"{len(remaining)}, {executor}"
        )
        run_shards(
            store,
            remaining,
            self.function,
            self.task,
            self.packing,
            executor=executor,
            report=report,
            listener=open_reporter(progress, self.unit),
        )

    @abstractmethod
    def describe(self) -> str:
        """One line about the work."""

    @abstractmethod
    def task(self, shard: int) -> tuple[Any, ...]:
        """Arguments with which :meth:`function` writes a shard."""

    @staticmethod
    @abstractmethod
    def function(*task: Any) -> Deferred[Receipt]:
        """Write one shard and its receipt, in a worker."""


@dataclass(frozen=True, kw_only=True)
class FeatureStorePlan(StorePlan[FeatureStore]):
    """A feature store to be written, from captions or from another one.

    Attributes:
        parameters: fitted arrays of the codec, for a new store.
        bits_per_value: bits that the codec takes, as found on the sample that it was fitted to.
    """

    unit = "captions"

    manifest: FeatureManifest
    parameters: dict[str, np.ndarray] = field(default_factory=dict)
    bits_per_value: float = 16.0

    def uncompressed_bytes(self) -> int:
        """Bytes of all hidden states in bfloat16."""
        identity = self.manifest.identity
        return self.packing.layout.num_rows * 2 * len(identity.layers) * identity.model.width

    def new_bytes(self) -> int:
        if self.existing is not None:
            return added_bytes(self.existing, self.manifest)
        return int(self.uncompressed_bytes() * self.bits_per_value / 16)

    def create(self) -> FeatureStore:
        captions, samples = self.first_tables()
        return FeatureStore.create(self.path, self.manifest, captions, samples, self.parameters)

    def first_tables(self) -> tuple[pa.Table | pa.RecordBatchReader, pa.Table]:
        """Captions and samples of a new store; the first may be read only once."""
        tables = self.tables()
        return tables["captions"], tables["samples"]


def write_store(
    store_type: type[S],
    plan_store: Callable[[S | None, Workers], StorePlan[S]],
    request: WriteRequest,
    report: Callable[[str], None],
    progress: Style,
    *,
    gpus: int | None = None,
) -> S:
    """Create a store, or append to it, or resume it: the way of every command that writes one.

    Args:
        plan_store: what is there, and what the workers are -> the plan; asks no worker.
        gpus: GPUs of this machine that tasks use; default: all.

    Raises:
        InputError: bad input, before any work; or a store that was made differently.
        LockedError: another process writes this store.
        ExtractionError, Interrupted, ClusterLostError: as :func:`run_shards`.
    """
    path = request.target
    with exclusive_writer(path, request.cluster, request.workers, report, gpus=gpus) as executor:
        existing = store_type.open_existing(path)
        workers = inspect_workers(executor, str(path), report)
        plan = plan_store(existing, workers).settle(executor, report)
        store = plan.prepare(open_or_create(plan, request.force, report))
        plan.fill(store, executor, report, progress)
    return store


def open_or_create(plan: StorePlan[S], force: bool, report: Callable[[str], None]) -> S:
    """The store of a plan, with room for all of its shards: created, appended to, or as it is.

    Raises:
        StoreError: the store there was made differently.
        InputError: too little space, and not ``force``.
    """
    existing, manifest = plan.existing, plan.manifest
    if existing is None:
        check_space(plan.path, plan.new_bytes(), force)
        return plan.create()
    if len(manifest.grown_from) > len(existing.manifest.grown_from):
        if existing.has_budget:
            raise StoreError(
                f"{existing.path} has a disk budget, and the captions have grown: runs that follow "
                "it could not be resumed. Complete it first, without --budget, or name a new folder"
            )
        existing.check_same(manifest.before_growth())
        check_space(plan.path, plan.new_bytes(), force)
        return append(existing, manifest, plan.tables(), report)
    existing.check_same(manifest)
    return existing


def run_shards(
    store: Store[Any],
    remaining: Sequence[int],
    function: Callable[..., Receipt | Deferred[Receipt]],
    arguments: Callable[[int], tuple[Any, ...]],
    packing: Packing,
    *,
    executor: Executor,
    report: Callable[[str], None],
    listener: Listener,
) -> None:
    """Run the remaining shards and finish the store.

    Args:
        function: encodes one shard, then writes it and its receipt, which is the result; importable
            by name.
        arguments: shard -> arguments of the function.
        executor: calls it.
        report: takes one line of text at a time.
        listener: takes the events of the run, from any thread.

    Raises:
        ExtractionError: shards failed, or the disk is full; all others are written.
        Interrupted: Ctrl-C.
        ClusterLostError: the scheduler is gone.
    """
    tally, num_shards = _Tally(), packing.layout.num_shards
    failed: dict[int, BaseException] = {}
    sweep(store, report)
    if remaining:
        report_dashboard(executor, report)
    with (
        explaining(store, report),
        _announced(store, remaining, packing, executor, listener, tally.started) as emit,
    ):
        on_progress = partial(emit, EntriesDone)
        outcomes = executor.run(remaining, function, arguments, on_progress=on_progress)
        for shard, outcome in outcomes:
            if isinstance(outcome, Receipt):
                tally.add(outcome)
                num_bytes = sum(file.num_bytes for file in outcome.files.values())
                emit(ShardWritten, shard, num_bytes)
            elif store.is_gone():
                raise _gone(store.path) from outcome
            else:
                failed[shard] = outcome
                store.write_quarantine(quarantine(shard, packing, outcome))
                emit(ShardFailed, shard, outcome)
    for warning, num in sorted(tally.warnings.items()):
        report(f"warning for {num} of {num_shards} shards: {warning}")
    if failed:
        shown = "\n  ".join(
            f"shard {shard}: {reason(error)}" for shard, error in sorted(failed.items())[:5]
        )
        raise ExtractionError(
            f"{len(failed)} of {num_shards} shards failed and are listed with their entries in "
            f"{store.path / 'quarantine'}:\n  {shown}\nAll others are written. Remove the cause "
            "and rerun the same command to resume."
        )
    if not store.is_complete:
        sweep(store, report)
        store.finish()
    report(tally.summary(store))


def report_dashboard(executor: Executor, report: Callable[[str], None]) -> None:
    """Report the address of Dask's dashboard, if there is one."""
    dashboard = executor.dashboard()
    if dashboard:
        report(f"Dask's dashboard: {dashboard}")


@contextmanager
def explaining(store: Store[Any], report: Callable[[str], None]) -> Iterator[None]:
    """Say what remains of a store if the disk is full, or Ctrl-C ends the block.

    Raises:
        ExtractionError: the disk is full.
        Interrupted: Ctrl-C.
    """
    num_shards = store.manifest.layout.num_shards
    try:
        yield
    except DiskFullError as error:
        raise ExtractionError(
            f"the disk of {store.path} is full ({error.strerror}). Shards that were written are "
            f"complete and kept: {len(store.remaining())} of {num_shards} shards remain. "
            "Free some space and rerun the same command to resume."
        ) from error
    except (Interrupted, KeyboardInterrupt):
        report(
            f"stopped: {len(store.remaining())} of {num_shards} shards remain; rerun the same "
            "command to resume"
        )
        raise


@contextmanager
def _announced(
    store: Store[Any],
    remaining: Sequence[int],
    packing: Packing,
    executor: Executor,
    listener: Listener,
    started: float,
) -> Iterator[Callable[..., None]]:
    """Tell a listener that shards are started and that they have ended; yields a function that
    emits the events between, from their class and its own attributes."""

    def emit(event: Callable[..., ProgressEvent], *attributes: object) -> None:
        listener(event(executor.num_workers, executor.num_errors, *attributes))

    emit(ShardsStarted, store.path.name, packing.work(), tuple(remaining), started)
    try:
        yield emit
    finally:
        emit(ShardsEnded)


def _gone(store: Path) -> ExtractionError:
    return ExtractionError(
        f"{store} is no store any more: its {MANIFEST} was moved or removed while shards were "
        "written. Put it back and rerun the same command to resume, or begin anew in a new folder"
    )


def sweep(store: Store[Any], report: Callable[[str], None]) -> None:
    """Remove what killed writers left."""
    left = remove_partial_files(store.path)
    if left:
        report(
            f"removed {len(left)} files that were being written when their writer was killed: "
            f"{format_bytes(sum(left))}"
        )


def quarantine(shard: int, packing: Packing, error: BaseException) -> Quarantine:
    """The record of a shard that failed."""
    trace = without_secrets("".join(traceback.format_exception(error)))
    entries = list(packing.entries(shard))
    return Quarantine(shard=shard, entries=entries, reason=reason(error), traceback=trace)


def reason(error: BaseException) -> str:
    """Why a shard failed, in a line."""
    if type(error).__name__ == "KilledWorker":
        return (
            "every worker that took it died: out of memory, or killed by the batch system? Its "
            "captions are listed too; a smaller --batch-tokens takes less memory"
        )
    return shown(f"{type(error).__name__}: {error}")


@dataclass
class _Tally:
    """Sums over the shards that this run wrote."""

    started: float = field(default_factory=time.perf_counter)
    rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, receipt: Receipt) -> None:
        self.rows += receipt.num_rows
        self.warnings.update(receipt.warnings)
        for name, seconds in receipt.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def summary(self, store: Store[Any]) -> str:
        elapsed = time.perf_counter() - self.started
        text = f"{store.path} is complete: {format_bytes(store.num_bytes())}"
        if not self.rows:
            return f"{text}; nothing was left to do"
        where = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{text}; {self.rows:,} rows in {elapsed:.1f} s (in workers: {where})"


def check_space(target: Path, needed: int, force: bool) -> None:
    """Refuse to begin if the disk is too small. Object stores are not asked.

    Args:
        needed: bytes.
        force: begin anyway.

    Raises:
        InputError: too little space; or ``force`` where there is no check.
    """
    if not is_local(target):  # object stores have no known limit
        if force:
            raise InputError(f"--force is not used: free space is not checked at {target}")
        return
    existing = next(p for p in (target.resolve(), *target.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free and not force:
        raise InputError(
            f"{target} needs {format_bytes(needed)}, but its disk has {format_bytes(free)} free. "
            "Free some space or name a place on another disk, or begin anyway with --force."
        )


def provenance(source: str, model: str) -> Provenance:
    """Provenance of a store: source, model, time and library versions."""
    return Provenance(
        source=without_secrets(source),
        model=without_secrets(model),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=library_versions(),
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that determine the stored numbers."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
