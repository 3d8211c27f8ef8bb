"""Check that every byte of a store is as it was written, and mark bad shards to be rewritten."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ...schemas import (
    BUDGET,
    LOCK_FILE,
    Checksums,
    Contract,
    InputError,
    Receipt,
    WrittenFile,
    digest,
    parse,
    refuse_differences,
    render,
)
from ...schemas.columns import numbers
from ...schemas.files import StorageError, inside, is_local, locate, read_file, scan
from ...schemas.json_file import MAX_BYTES, load_json
from ...schemas.verbosity import progress_bar
from .array import ShardedArray
from .budget.shards import evict
from .checks.tables import text_faults
from .conditioning import ConditioningStore
from .documents import (
    AGAINST,
    CHECKSUMS,
    GROWING,
    MANIFEST,
    QUARANTINE,
    RECEIPTS,
    digest_file,
    is_shard_document,
    shard_document,
    shard_of,
)
from .features import FeatureStore
from .latents import LatentStore
from .open import open_store
from .shard_file import read_bytes

T = TypeVar("T")
AnyStore = FeatureStore | LatentStore | ConditioningStore
_Counts = Callable[[int], tuple[int, int]]
"""Shard -> number of entries and of rows."""
_DAMAGE = (InputError, OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException)
"""Errors that reading damaged files raises, those of zarr and Arrow included."""
_FILES_OF_THE_HUB = ("README.md", ".gitattributes", ".cache/huggingface/")


@dataclass(frozen=True)
class Problem:
    """A file or array that is not as it was written.

    Attributes:
        where: file, relative to the store.
        what: what was found, and what was expected.
        shard: the shard whose rewriting repairs it; None: rewriting shards does not help.
    """

    where: str
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, repr=False)
class Verification:
    """Result of :func:`verify`.

    Attributes:
        path: of the store.
        problems: in the order found; if there is none, every byte is as it was written.
        unfinished: shards that are not written yet, which is no problem.
        evicted: shards that went for the sake of a disk budget, which is no problem either: their
            receipts prove what they will be once they are encoded again.
        warnings: what could not be checked, and files that are not the store's.
        num_bytes: bytes read.
    """

    path: Path
    problems: list[Problem]
    unfinished: list[int]
    warnings: list[str]
    num_bytes: int
    evicted: list[int] = field(default_factory=list)

    @property
    def bad_shards(self) -> list[int]:
        """Shards to be rewritten."""
        return sorted({p.shard for p in self.problems if p.shard is not None})

    @property
    def beyond_repair(self) -> list[Problem]:
        """Problems that rewriting shards cannot repair."""
        return [problem for problem in self.problems if problem.shard is None]

    def __repr__(self) -> str:
        state = f"{len(self.problems)} problems" if self.problems else "as it was written"
        lines = [f"{self.path}: {state}; {self.num_bytes:,} bytes read"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.unfinished:
            lines.append(f"  not written yet: {len(self.unfinished)} shards")
        if self.evicted:
            lines.append(
                f"  evicted: {len(self.evicted)} shards, of which the receipts were checked alone"
            )
        if self.bad_shards:
            shown = ", ".join(map(str, self.bad_shards))
            lines.append(
                f"Shards to be rewritten: {shown}. verify --repair marks them as not written; then "
                "rerun the command that made the store."
            )
        if self.beyond_repair:
            lines.append(
                "Files that are not of a shard cannot be rewritten: put them back from a copy, or "
                "make the store again."
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(
            {
                "path": str(self.path),
                "intact": not self.problems,
                "problems": [vars(problem) for problem in self.problems],
                "bad_shards": self.bad_shards,
                "unfinished": self.unfinished,
                "evicted": self.evicted,
                "warnings": self.warnings,
                "bytes": self.num_bytes,
            },
            indent=1,
        )


def verify(path: str | os.PathLike[str], *, progress: bool = False) -> Verification:
    """Read a whole store, finished or not, and compare it with its own manifest and checksums.

    Args:
        path: folder or URL of a store.
        progress: show a bar.

    Raises:
        StoreError: no store there, or it was stopped while it grew.
    """
    path = locate(path)
    report = _Report(path)
    try:
        store = open_store(path)
    except InputError as error:
        if isinstance(error, StorageError) and not is_local(path):
            raise
        if not (path / MANIFEST).exists() or (path / GROWING / MANIFEST).exists():
            raise
        report.problem(MANIFEST, str(error))
        return report.result([])
    report.read_document(MANIFEST, type(store.manifest))
    known = _check_checksums(report, store)
    counts = _check_tables(report, store)
    arrays = _check_arrays(report, store)
    # Which arrays hold a shard of latents is in their table.
    needs_table = counts is None and isinstance(store, LatentStore)
    receipts = {} if needs_table else _check_receipts(report, store)
    evicted = _find_evicted(report, receipts) if store.has_budget else []
    there = {shard: receipt for shard, receipt in receipts.items() if shard not in {*evicted}}
    _check_shards(report, store, arrays, there, counts, progress)
    unfinished = [] if counts is None else _check_missing(report, store, receipts)
    unfinished = [shard for shard in unfinished if shard not in {*evicted}]
    for receipt in receipts.values():
        known |= {*receipt.files}
    _check_strangers(report, known)
    return replace(report.result(unfinished), evicted=evicted)


def repair(verification: Verification) -> list[int]:
    """Mark bad shards as not written; the command that made the store then rewrites only those.

    Raises:
        InputError: there is damage outside shards; nothing is changed.
    """
    refuse_differences(
        map(str, verification.beyond_repair),
        f"{verification.path} has damage that rewriting shards cannot repair",
        "Put these files back from a copy first, or make the store again. Nothing was changed.",
    )
    if not verification.bad_shards:
        return []
    store = open_store(verification.path)
    if store.has_budget:
        evict(store, verification.bad_shards)
        for problem in verification.problems:  # other receipts prove what the shards must be
            if problem.where.startswith(f"{RECEIPTS}/"):
                inside(store.path, problem.where).unlink(missing_ok=True)
    else:
        store.reopen(verification.bad_shards)
    return verification.bad_shards


class _Report:
    """Problems and warnings as they are found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.num_bytes = 0
        found = scan(path)
        self.files = found.files
        for name, kind in found.others.items():
            self.problem(name, f"is {kind}; a store holds plain files")

    def problem(self, where: str, what: str, shard: int | None = None) -> None:
        self.problems.append(Problem(where, what, shard))

    def attempt(self, where: str, check: Callable[[], T]) -> T | None:
        """Run a check; if damage stops it, that is a problem like any other."""
        try:
            return check()
        except InputError as error:
            self.problem(where, str(error).replace(f"{self.path}/", ""))
        except _DAMAGE as error:
            self.problem(where, f"cannot be read: {type(error).__name__}: {error}")
        return None

    def read_document(self, name: str, kind: type[Contract], shard: int | None = None) -> Any:
        """A JSON file that must be exactly as semroute writes it; None where it is not."""
        try:
            raw = read_file(inside(self.path, name), limit=MAX_BYTES)
            self.num_bytes += len(raw)
            contract = parse(kind, load_json(raw, name), name)
        except (OSError, ValueError) as error:  # InputError is a ValueError
            self.problem(name, f"cannot be read: {error}", shard)
            return None
        # Keys that an early version did not have are not missing.
        if raw != render(contract, early=True).encode():
            self.problem(name, "is not written as semroute writes it; a byte was changed", shard)
            return None
        return contract

    def result(self, unfinished: list[int]) -> Verification:
        return Verification(
            self.path, self.problems, unfinished, sorted(self.warnings), self.num_bytes
        )


def _check_checksums(report: _Report, store: AnyStore) -> set[str]:
    """Check all files but shards and receipts; returns the files that belong to the store."""
    if CHECKSUMS not in report.files:  # which the receipts may prove to be a loss
        return set()
    checksums: Checksums | None = report.read_document(CHECKSUMS, Checksums)
    if checksums is None:
        return set()
    if digest(store.manifest.unfinished(), early=True) != checksums.manifest:
        report.problem(MANIFEST, f"its sha256 is not the one in {CHECKSUMS}")
    for name, expected in checksums.files.items():
        if not store.is_written_once(name):
            report.problem(CHECKSUMS, f"lists {name!r}, which is no file of a store")
            continue
        if name not in report.files:
            report.problem(name, "is missing")
            continue
        report.num_bytes += report.files[name].num_bytes
        found = report.attempt(name, partial(digest_file, inside(report.path, name)))
        if found is not None and found != expected:
            report.problem(name, f"its sha256 is not the one in {CHECKSUMS}")
    for name in report.files:
        if store.is_written_once(name) and name not in checksums.files:
            report.problem(name, f"is not listed in {CHECKSUMS}")
    return {name for name in checksums.files if store.is_written_once(name)}


def _check_tables(report: _Report, store: AnyStore) -> _Counts | None:
    """Compare tables with the manifest; returns what they put into each shard."""
    samples = report.attempt("samples.parquet", lambda: store.samples)
    if isinstance(store, LatentStore):
        return None if samples is None else _count(store)
    captions = report.attempt("captions.parquet", lambda: store.captions)
    if captions is None or samples is None:
        return None
    for what in text_faults(captions, samples, store.manifest.identity):
        where, _, fault = what.partition(": ")
        report.problem(where, fault)
    return _count(store)


def _check_arrays(report: _Report, store: AnyStore) -> dict[str, ShardedArray]:
    """Compare metadata and parameters with the manifest; returns the arrays that can be read."""
    arrays = {}
    for name in report.attempt(store.group, lambda: store.stored_arrays) or ():
        file = f"{store.group}/{name}/zarr.json"
        array = report.attempt(file, partial(store.open_array, name))
        if array is not None:
            arrays[name] = array
    if isinstance(store, FeatureStore):
        report.attempt(f"{store.group}/parameters", lambda: store.codec)
        layers = report.attempt(f"{store.group}/layer", store.stored_layers)
        if layers is not None and layers != store.layers:
            report.problem(
                f"{store.group}/layer", f"holds {layers}; the manifest says {store.layers}"
            )
    return arrays


def _check_receipts(report: _Report, store: AnyStore) -> dict[int, Receipt]:
    """Receipts that are as they were written, by shard."""
    receipts: dict[int, Receipt] = {}
    num_unsealed = 0
    for name in report.files:
        if not name.startswith(f"{RECEIPTS}/"):
            continue
        shard = shard_of(name)
        if (
            shard is None
            or not is_shard_document(name, RECEIPTS)
            or shard >= store.manifest.layout.num_shards
        ):
            report.warnings.append(f"{name} is no receipt of this store")
            continue
        receipt: Receipt | None = report.read_document(name, Receipt, shard)
        if receipt is None:
            continue
        unsealed = receipt.model_copy(update={"sha256": ""})
        if not receipt.sha256:
            num_unsealed += 1
        elif digest(unsealed, early=True) != receipt.sha256:
            report.problem(name, "its sha256 is not that of its contents", shard)
            continue
        faults = [*store.receipt_faults(receipt, shard)]
        for fault in faults:
            report.problem(name, fault, shard)
        if not faults:
            receipts[shard] = receipt
    if CHECKSUMS not in report.files:
        _report_no_checksums(report, lost=num_unsealed < len(receipts))
    if num_unsealed:
        report.warnings.append(
            f"{num_unsealed} receipts have no sha256 of their own (an early version's)"
        )
    return receipts


def _report_no_checksums(report: _Report, *, lost: bool) -> None:
    """Args: lost: the receipts are of a version that wrote checksums."""
    if lost:
        report.problem(CHECKSUMS, "is missing; without it no table can be checked")
        return
    report.warnings.append(
        f"{CHECKSUMS} is not there (a store of an early version): tables, manifest and metadata "
        "could be compared with each other only"
    )


def _find_evicted(report: _Report, receipts: Mapping[int, Receipt]) -> list[int]:
    """Shards of which a file is not there, in a store with a disk budget."""
    return sorted(
        s for s, receipt in receipts.items() if not receipt.files.keys() <= report.files.keys()
    )


def _check_shards(
    report: _Report,
    store: AnyStore,
    arrays: Mapping[str, ShardedArray],
    receipts: Mapping[int, Receipt],
    expected: _Counts | None,
    progress: bool,
) -> None:
    """Read all shard files and compare them with their receipts, and receipts with the tables."""
    total = sum(f.num_bytes for receipt in receipts.values() for f in receipt.files.values())
    with progress_bar(
        total=total, unit="B", unit_scale=True, desc="verify", disable=not progress
    ) as bar:
        for shard, receipt in sorted(receipts.items()):
            own = {name: arrays[name] for name in store.names_of(shard) if name in arrays}
            counted = (receipt.num_entries, receipt.num_rows)
            if expected is not None and counted != expected(shard):
                report.problem(
                    shard_document(RECEIPTS, shard),
                    f"entries and rows are {counted}; the tables say {expected(shard)}",
                    shard,
                )
            contents = {}
            for name, written in receipt.files.items():
                array = own.get(name.split("/")[1])
                limit = sys.maxsize if array is None else array.max_shard_bytes
                path = name.partition("/c/")[0]
                contents[path] = _read_shard_file(report, name, written, shard, limit)
                bar.update(written.num_bytes)
            for name, array in own.items():
                path = f"{store.group}/{name}"
                _check_chunks(report, path, array, shard, contents.get(path))


def _read_shard_file(
    report: _Report, name: str, written: WrittenFile, shard: int, limit: int
) -> np.ndarray | None:
    """Bytes of a shard file, of which size and sha256 are checked; None if it cannot be read.

    Args:
        limit: largest size, in bytes, that the layout allows.
    """
    size = report.files[name].num_bytes if name in report.files else 0
    if size > limit:
        report.problem(name, f"has {size:,} bytes; the layout allows {limit:,}", shard)
        return None
    if name in report.files and size != written.num_bytes:
        report.problem(name, f"has {size:,} bytes instead of {written.num_bytes:,}", shard)
        return None
    try:
        content = read_bytes(report.path, name)
    except (InputError, OSError) as error:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        why = "No such file or directory" if is_missing else error
        report.problem(name, f"cannot be read: {why}", shard)
        return None
    report.num_bytes += size
    if hashlib.sha256(content.data).hexdigest() != written.sha256:
        report.problem(name, "its sha256 is not the one in the receipt", shard)
    return content


def _check_chunks(
    report: _Report, name: str, array: ShardedArray, shard: int, content: np.ndarray | None
) -> None:
    """Check index and chunks by their own checksums, which tell where in the shard damage is."""
    try:
        array.check_shard(shard, content)
    except _DAMAGE as error:
        report.problem(name, str(error).removeprefix(f"{report.path}/"), shard)


def _check_missing(report: _Report, store: AnyStore, receipts: Mapping[int, Receipt]) -> list[int]:
    """Look for shards of a complete store without a receipt, and check the dropped samples; returns
    the shards of an unfinished store that are to be written."""
    shards = range(store.manifest.layout.num_shards)  # as many as the tables have
    missing = {*shards} - {*receipts}
    if not store.is_complete:
        sizes = {name: entry.num_bytes for name, entry in report.files.items()}
        incomplete = {
            shard
            for shard, receipt in receipts.items()
            if receipt.broken  # images that are tried again
            or any(sizes.get(name) != file.num_bytes for name, file in receipt.files.items())
        }
        return sorted(missing | incomplete)
    if isinstance(store, LatentStore) and not missing:
        broken = sorted(sample for receipt in receipts.values() for sample in receipt.broken)
        dropped = store.manifest.identity.dropped
        if broken != dropped:
            report.problem(
                MANIFEST,
                f"drops {len(dropped)} samples; receipts say that {len(broken)} have no latent",
            )
    reported = {problem.shard for problem in report.problems}
    for shard in sorted(missing - reported):
        report.problem(shard_document(RECEIPTS, shard), "is missing", shard)
    return []


def _check_strangers(report: _Report, known: set[str]) -> None:
    """Warn of files that do not belong to the store; of receipts there was a warning already."""
    if CHECKSUMS not in report.files:
        return
    known |= {MANIFEST, CHECKSUMS, LOCK_FILE, AGAINST, BUDGET}
    allowed = (f"{RECEIPTS}/", *_FILES_OF_THE_HUB)
    for name in report.files:
        belongs = name in known or is_shard_document(name, QUARANTINE)
        if not belongs and not name.startswith(allowed):
            report.warnings.append(f"{name} does not belong to the store")


def _count(store: AnyStore) -> _Counts:
    """Number of entries and of rows that the tables put into each shard."""
    layout = store.manifest.layout
    if isinstance(store, LatentStore):
        counts = np.bincount(store.rows // layout.rows_per_shard, minlength=layout.num_shards)
        return lambda shard: (int(counts[shard]), int(counts[shard]))
    shards = numbers(store.captions["shard"])
    num_rows = store.num_rows(range(len(store)))
    entries = np.bincount(shards, minlength=layout.num_shards)
    rows = np.bincount(shards, weights=num_rows, minlength=layout.num_shards)
    return lambda shard: (int(entries[shard]), int(rows[shard]))
