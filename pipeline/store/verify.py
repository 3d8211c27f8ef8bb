"""Check that every byte of a store is as it was written, and mark bad shards to be rewritten."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ...schemas import (
    LOCK_FILE,
    Checksums,
    Contract,
    InputError,
    Receipt,
    WrittenFile,
    digest,
    fingerprint,
    parse,
    refuse_differences,
    render,
)
from ...schemas.files import list_files, locate, read_file
from .array import ShardedArray, open_array
from .conditioning import ConditioningStore
from .documents import (
    AGAINST,
    CHECKSUMS,
    GROWING,
    MANIFEST,
    QUARANTINE,
    RECEIPTS,
    digest_file,
    shard_document,
    shard_of,
)
from .features import FeatureStore
from .latents import LatentStore
from .open import open_store
from .shard_file import read_bytes

T = TypeVar("T")
AnyStore = FeatureStore | LatentStore | ConditioningStore
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
        warnings: what could not be checked, and files that are not the store's.
        num_bytes: bytes read.
    """

    path: Path
    problems: list[Problem]
    unfinished: list[int]
    warnings: list[str]
    num_bytes: int

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
        if not (path / MANIFEST).exists() or (path / GROWING / MANIFEST).exists():
            raise
        report.problem(MANIFEST, str(error))
        return report.result([])
    report.read_document(MANIFEST, type(store.manifest))
    known = _check_checksums(report, store)
    report.attempt("tables", lambda: _check_tables(report, store))
    arrays = report.attempt(store.group, lambda: _check_arrays(report, store)) or {}
    expected = report.attempt("captions.parquet", lambda: _entries_and_rows(store))
    receipts = _check_receipts(report, store)
    _check_shards(report, store, arrays, receipts, expected, progress)
    _check_missing(report, store, receipts)
    for receipt in receipts.values():
        known |= {*receipt.files}
    _check_strangers(report, known)
    remaining = report.attempt(RECEIPTS, store.remaining) or []
    return report.result([] if store.is_complete else remaining)


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
    if verification.bad_shards:
        open_store(verification.path).reopen(verification.bad_shards)
    return verification.bad_shards


class _Report:
    """Problems and warnings as they are found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.num_bytes = 0
        self.files = list_files(path)

    def problem(self, where: str, what: str, shard: int | None = None) -> None:
        self.problems.append(Problem(where, what, shard))

    def attempt(self, where: str, check: Callable[[], T]) -> T | None:
        """Run a check; if damage stops it, that is a problem like any other."""
        try:
            return check()
        except _DAMAGE as error:
            self.problem(where, f"cannot be read: {type(error).__name__}: {error}")
            return None

    def read_document(self, name: str, kind: type[Contract], shard: int | None = None) -> Any:
        """A JSON file that must be exactly as semroute writes it; None where it is not."""
        try:
            raw = read_file(self.path / name)
            self.num_bytes += len(raw)
            contract = parse(kind, json.loads(raw.decode("utf-8")), name)
        except (OSError, ValueError) as error:  # InputError and JSONDecodeError are ValueErrors
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
    if not (report.path / CHECKSUMS).exists():
        report.warnings.append(
            f"{CHECKSUMS} is not there (a store of an early version): tables, manifest and "
            "metadata could be compared with each other only"
        )
        return set()
    checksums: Checksums | None = report.read_document(CHECKSUMS, Checksums)
    if checksums is None:
        return set()
    if digest(store.manifest.unfinished(), early=True) != checksums.manifest:
        report.problem(MANIFEST, f"its sha256 is not the one in {CHECKSUMS}")
    for name, expected in checksums.files.items():
        if name not in report.files:
            report.problem(name, "is missing")
            continue
        report.num_bytes += report.files[name].num_bytes
        if digest_file(report.path / name) != expected:
            report.problem(name, f"its sha256 is not the one in {CHECKSUMS}")
    return {*checksums.files}


def _check_tables(report: _Report, store: AnyStore) -> None:
    """Compare tables with the manifest."""
    num_samples, expected = store.samples.num_rows, store.manifest.identity.samples.num_samples
    if num_samples != expected:
        report.problem("samples.parquet", f"has {num_samples} rows; the manifest says {expected}")
    if not isinstance(store, LatentStore):
        for what in _caption_problems(store):
            report.problem("captions.parquet", what)


def _check_arrays(report: _Report, store: AnyStore) -> dict[str, ShardedArray]:
    """Compare metadata and parameters with the manifest; returns the arrays that can be read."""
    arrays = store.arrays
    if isinstance(store, FeatureStore):
        layers = np.asarray(open_array(report.path / store.group / "layer")[:])
        if layers.tolist() != store.layers:
            report.problem(
                f"{store.group}/layer",
                f"holds {layers.tolist()}; the manifest says {store.layers}",
            )
    for name, array in arrays.items():
        if not array.is_known:
            report.problem(f"{store.group}/{name}/zarr.json", "is not of the documented form")
    return {name: array for name, array in arrays.items() if array.is_known}


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
            or name != shard_document(RECEIPTS, shard)
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
        if receipt.shard != shard:
            report.problem(name, f"is about shard {receipt.shard}", shard)
            continue
        receipts[shard] = receipt
    if num_unsealed:
        report.warnings.append(
            f"{num_unsealed} receipts have no sha256 of their own (an early version's)"
        )
    return receipts


def _check_shards(
    report: _Report,
    store: AnyStore,
    arrays: Mapping[str, ShardedArray],
    receipts: Mapping[int, Receipt],
    expected: Callable[[int], tuple[int, int]] | None,
    progress: bool,
) -> None:
    """Read all shard files and compare them with their receipts, and receipts with the tables."""
    total = sum(f.num_bytes for receipt in receipts.values() for f in receipt.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for shard, receipt in sorted(receipts.items()):
            own = _arrays_of(store, arrays, shard)
            counted = (receipt.num_entries, receipt.num_rows)
            if expected is not None and counted != expected(shard):
                report.problem(
                    shard_document(RECEIPTS, shard),
                    f"entries and rows are {counted}; the tables say {expected(shard)}",
                    shard,
                )
            folders = {name.partition("c/")[0] for name in receipt.files}
            if own and folders != {f"{store.group}/{name}/" for name in own}:
                report.problem(
                    shard_document(RECEIPTS, shard), "does not list a file of every array", shard
                )
            contents = {}
            for name, written in receipt.files.items():
                contents[name.partition("/c/")[0]] = _read_shard_file(report, name, written, shard)
                bar.update(written.num_bytes)
            for name, array in own.items():
                path = f"{store.group}/{name}"
                _check_chunks(report, path, array, shard, contents.get(path))


def _read_shard_file(
    report: _Report, name: str, written: WrittenFile, shard: int
) -> np.ndarray | None:
    """Bytes of a shard file, of which size and sha256 are checked; None if it cannot be read."""
    size = report.files[name].num_bytes if name in report.files else 0
    if name in report.files and size != written.num_bytes:
        report.problem(name, f"has {size:,} bytes instead of {written.num_bytes:,}", shard)
        return None
    try:
        content = read_bytes(report.path / name)
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


def _check_missing(report: _Report, store: AnyStore, receipts: Mapping[int, Receipt]) -> None:
    """Look for shards of a complete store without a receipt, and check the dropped samples."""
    if not store.is_complete:
        return
    missing = {*range(store.manifest.layout.num_shards)} - {*receipts}
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


def _check_strangers(report: _Report, known: set[str]) -> None:
    """Warn of files that do not belong to the store."""
    if not (report.path / CHECKSUMS).exists():
        return
    known |= {MANIFEST, CHECKSUMS, LOCK_FILE, AGAINST}
    allowed = (f"{RECEIPTS}/", f"{QUARANTINE}/", *_FILES_OF_THE_HUB)
    for name in report.files:
        if name not in known and not name.startswith(allowed):
            report.warnings.append(f"{name} does not belong to the store")


def _arrays_of(
    store: AnyStore, arrays: Mapping[str, ShardedArray], shard: int
) -> Mapping[str, ShardedArray]:
    """Arrays that hold a shard: all, or those of its bucket if there are buckets."""
    if not isinstance(store, LatentStore) or not store.manifest.identity.buckets:
        return arrays
    first = np.flatnonzero(store.rows // store.manifest.layout.rows_per_shard == shard)[:1]
    names = {name for bucket in store.buckets[first] for name in store.names(int(bucket))}
    return {name: array for name, array in arrays.items() if name in names}


def _entries_and_rows(store: AnyStore) -> Callable[[int], tuple[int, int]]:
    """Shard -> number of entries and of rows that the tables put there."""
    layout = store.manifest.layout
    if isinstance(store, LatentStore):
        counts = np.bincount(store.rows // layout.rows_per_shard, minlength=layout.num_shards)
        return lambda shard: (int(counts[shard]), int(counts[shard]))
    shards = store.captions["shard"].to_numpy()
    num_rows = store.num_rows(range(len(store)))
    entries = np.bincount(shards, minlength=layout.num_shards)
    rows = np.bincount(shards, weights=num_rows, minlength=layout.num_shards)
    return lambda shard: (int(entries[shard]), int(rows[shard]))


def _caption_problems(store: FeatureStore | ConditioningStore) -> Iterator[str]:
    """Contradictions within the tables, and between them and the manifest."""
    captions, identity, layout = store.captions, store.manifest.identity, store.manifest.layout
    if captions.num_rows != identity.captions.num_captions:
        yield f"has {captions.num_rows} rows; the manifest says {identity.captions.num_captions}"
        return
    if fingerprint(captions["text"]) != identity.captions.fingerprint:
        yield "its texts are not those of the manifest's fingerprint"
    starts, stops, shards = (
        captions[name].to_numpy() for name in ("row_start", "row_stop", "shard")
    )
    num = _expected_rows(store)
    if not np.array_equal(captions["caption_id"].to_numpy(), np.arange(len(store))):
        yield "caption_id is not 0, 1, 2 and so on"
    if not np.array_equal(stops - starts, num) or num.sum() != layout.num_rows:
        yield f"rows are not those of the tokens, or not the manifest's {layout.num_rows}"
    if (starts[1:] < stops[:-1]).any() or starts.min() < 0:
        yield "rows of two captions overlap"
    if not np.array_equal(starts // layout.rows_per_shard, shards) or not np.array_equal(
        (stops - 1) // layout.rows_per_shard, shards
    ):
        yield "rows lie in another shard than the one named"
    ids = store.samples["caption_ids"].combine_chunks().values.to_numpy()
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(store)):
        yield f"samples.parquet names captions {ids.min()} to {ids.max()}"


def _expected_rows(store: FeatureStore | ConditioningStore) -> np.ndarray:
    """Number of rows that each caption must have, ``[captions]``."""
    if isinstance(store, FeatureStore):
        return np.asarray(store.captions["num_tokens"].to_numpy())
    if store.manifest.identity.ragged:
        return np.asarray(pc.list_value_length(store.captions["token_ids"]).to_numpy())
    return np.ones(len(store), np.int64)
