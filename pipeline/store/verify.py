"""Whether a store is what was written: every byte of it, shard by shard, and what to do if not."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ...schemas import (
    LOCK_FILE,
    Checksums,
    Contract,
    InputError,
    Receipt,
    digest,
    fingerprint,
    parse,
    render,
)
from ...schemas.files import list_files, locate, read_file
from .array import ShardedArray, open_array
from .documents import CHECKSUMS, GROWING, MANIFEST, digest_file
from .features import FeatureStore
from .latents import LatentStore
from .open import open_store
from .shard_file import read_bytes

T = TypeVar("T")
_DAMAGE = (InputError, OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException)
"""What reading damaged files raises, zarr's and Arrow's own errors included."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written.

    Attributes:
        where: file, relative to the store.
        what: what was found, and what was expected.
        shard: that can be written anew to mend it; None: that would not mend it.
    """

    where: str
    what: str
    shard: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, repr=False)
class Verification:
    """What :func:`verify` found.

    Attributes:
        path: of the store.
        problems: in the order found; none, and every byte is as it was written.
        unfinished: shards that are not written yet, which is no problem.
        warnings: what could not be checked, and files that are not the store's.
        num_bytes: that were read.
    """

    path: Path
    problems: list[Problem]
    unfinished: list[int]
    warnings: list[str]
    num_bytes: int

    @property
    def bad_shards(self) -> list[int]:
        """That can be written anew."""
        return sorted({p.shard for p in self.problems if p.shard is not None})

    @property
    def beyond_repair(self) -> list[Problem]:
        """That no shard written anew would mend."""
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
                f"Shards to be written anew: {shown}. verify --repair marks them as not written; "
                "then run the command that made the store."
            )
        if self.beyond_repair:
            lines.append(
                "What is not in a shard cannot be written anew: put it back from a copy, or make "
                "the store again."
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
    """Read a whole store, finished or not, and compare it with all that it says of itself.

    Args:
        path: folder or URL of a feature or latent store.
        progress: show a bar.

    Raises:
        StoreError: no store there, or it was stopped while it grew.
    """
    path = locate(path)
    found = _Findings(path)
    try:
        store = open_store(path)
    except InputError as error:
        if not (path / MANIFEST).exists() or (path / GROWING / MANIFEST).exists():
            raise
        found.problem(MANIFEST, str(error))
        return found.result([])
    found.check_document(MANIFEST, type(store.manifest))
    known = found.check_checksums(store)
    found.attempt("tables", lambda: found.check_tables(store))
    arrays = found.attempt(store.group, lambda: found.check_arrays(store)) or {}
    entries = found.attempt("captions.parquet", lambda: _entries(store))
    known |= found.check_shards(store, arrays, entries, progress)
    found.check_strangers(known)
    remaining = found.attempt("receipts", store.remaining) or []
    return found.result([] if store.is_complete else remaining)


def repair(verification: Verification) -> list[int]:
    """Mark bad shards as not written; the command that made the store then writes just those.

    Raises:
        InputError: there is damage outside shards; nothing is changed.
    """
    if verification.beyond_repair:
        listed = "\n  ".join(map(str, verification.beyond_repair))
        raise InputError(
            f"{verification.path} has damage that no shard written anew would mend:\n  {listed}\n"
            "Put these files back from a copy first, or make the store again. Nothing was changed."
        )
    if verification.bad_shards:
        open_store(verification.path).reopen(verification.bad_shards)
    return verification.bad_shards


class _Findings:
    """The checks, each of which adds what it finds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.num_bytes = 0
        self.files = list_files(path)

    def problem(self, where: str, what: str, shard: int | None = None) -> None:
        self.problems.append(Problem(where, what, shard))

    def attempt(self, where: str, check: Callable[[], T]) -> T | None:
        """Run a check; that damage stops it is a problem like any other."""
        try:
            return check()
        except _DAMAGE as error:
            self.problem(where, f"cannot be read: {type(error).__name__}: {error}")
            return None

    def result(self, unfinished: list[int]) -> Verification:
        return Verification(
            self.path, self.problems, unfinished, sorted(self.warnings), self.num_bytes
        )

    def check_document(
        self, name: str, kind: type[Contract], shard: int | None = None
    ) -> Any | None:
        """A JSON file that must be there to the letter: what it holds, or None."""
        try:
            raw = read_file(self.path / name)
            self.num_bytes += len(raw)
            contract = parse(kind, json.loads(raw.decode("utf-8")), name)
        except (OSError, ValueError) as error:  # InputError and JSONDecodeError are ValueErrors
            self.problem(name, f"cannot be read: {error}", shard)
            return None
        except InputError as error:
            self.problem(name, str(error), shard)
            return None
        # Keys that an early version did not have are not missing.
        if raw != render(contract, early=True).encode():
            self.problem(name, "is not written as semroute writes it; a byte was changed", shard)
            return None
        return contract

    def check_checksums(self, store: FeatureStore | LatentStore) -> set[str]:
        """Everything but shards and receipts; returns the files that belong to the store."""
        if not (self.path / CHECKSUMS).exists():
            self.warnings.append(
                f"{CHECKSUMS} is not there (a store of an early version): tables, manifest and "
                "metadata could be compared with each other only"
            )
            return set()
        checksums: Checksums | None = self.check_document(CHECKSUMS, Checksums)
        if checksums is None:
            return set()
        if digest(store.manifest.unfinished(), early=True) != checksums.manifest:
            self.problem(MANIFEST, f"its sha256 is not the one in {CHECKSUMS}")
        for name, expected in checksums.files.items():
            if name not in self.files:
                self.problem(name, "is missing")
                continue
            self.num_bytes += self.files[name].num_bytes
            if digest_file(self.path / name) != expected:
                self.problem(name, f"its sha256 is not the one in {CHECKSUMS}")
        return set(checksums.files)

    def check_tables(self, store: FeatureStore | LatentStore) -> None:
        """Tables against the manifest."""
        num_samples, expected = store.samples.num_rows, store.manifest.identity.samples.num_samples
        if num_samples != expected:
            self.problem("samples.parquet", f"has {num_samples} rows; the manifest says {expected}")
        if isinstance(store, FeatureStore):
            for what in _caption_problems(store):
                self.problem("captions.parquet", what)

    def check_arrays(self, store: FeatureStore | LatentStore) -> dict[str, ShardedArray]:
        """Metadata and parameters against the manifest; returns the arrays that can be read."""
        found = store.arrays
        if isinstance(store, FeatureStore):
            layers = np.asarray(open_array(self.path / store.group / "layer")[:])
            if layers.tolist() != store.layers:
                self.problem(
                    f"{store.group}/layer",
                    f"holds {layers.tolist()}; the manifest says {store.layers}",
                )
        for name, array in found.items():
            if not array.is_known:
                self.problem(f"{store.group}/{name}/zarr.json", "is not of the documented form")
        return {name: array for name, array in found.items() if array.is_known}

    def check_shards(
        self,
        store: FeatureStore | LatentStore,
        arrays: dict[str, ShardedArray],
        entries: Callable[[int], tuple[int, int]] | None,
        progress: bool,
    ) -> set[str]:
        """Receipts, and the shards that they prove; returns the files that belong to the store."""
        names = [name for name in self.files if name.startswith("receipts/")]
        known = {*names, *(name for name in self.files if name.startswith("quarantine/"))}
        receipts: dict[int, Receipt] = {}
        unsealed_receipts = 0
        for name in names:
            shard = _shard_of(name, store.manifest.layout.num_shards)
            if shard is None:
                self.warnings.append(f"{name} is no receipt of this store")
                continue
            receipt: Receipt | None = self.check_document(name, Receipt, shard)
            if receipt is None:
                continue
            unsealed = receipt.model_copy(update={"sha256": ""})
            if not receipt.sha256:
                unsealed_receipts += 1
            elif digest(unsealed, early=True) != receipt.sha256:
                self.problem(name, "its sha256 is not that of its contents", shard)
                continue
            if receipt.shard != shard:
                self.problem(name, f"is about shard {receipt.shard}", shard)
                continue
            receipts[shard] = receipt
        if unsealed_receipts:
            self.warnings.append(
                f"{unsealed_receipts} receipts have no sha256 of their own (an early version's)"
            )
        total = sum(f.num_bytes for receipt in receipts.values() for f in receipt.files.values())
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="verify", disable=not progress
        ) as bar:
            for shard, receipt in sorted(receipts.items()):
                known |= set(receipt.files)
                counted = (receipt.num_entries, receipt.num_rows)
                expected = counted if entries is None else entries(shard)
                if counted != expected:
                    self.problem(f"receipts/shard-{shard:06d}.json", f"entries and rows are "
                                 f"{counted}; the tables say {expected}", shard)  # fmt: skip
                own = _arrays_of(store, arrays, shard)
                prefix = {f"{store.group}/{name}/" for name in own}
                if own and {name.partition("c/")[0] for name in receipt.files} != prefix:
                    self.problem(f"receipts/shard-{shard:06d}.json", "does not list a file of "
                                 "every array", shard)  # fmt: skip
                contents = {}
                for name in receipt.files:
                    contents[name.partition("/c/")[0]] = self._check_file(name, receipt, shard)
                    bar.update(receipt.files[name].num_bytes)
                for name, array in own.items():
                    where = f"{store.group}/{name}"
                    self._check_chunks(where, array, shard, contents.get(where))
        missing = set(range(store.manifest.layout.num_shards)) - {*receipts}
        reported = {problem.shard for problem in self.problems}
        if store.is_complete and isinstance(store, LatentStore):
            lacking = sorted(sample for each in receipts.values() for sample in each.broken)
            if not missing and lacking != store.manifest.identity.dropped:
                self.problem(MANIFEST, f"drops {len(store.manifest.identity.dropped)} samples; "
                             f"receipts say that {len(lacking)} have no latent")  # fmt: skip
        if store.is_complete:
            for shard in sorted(missing - reported):
                self.problem(f"receipts/shard-{shard:06d}.json", "is missing", shard)
        return known

    def _check_file(self, name: str, receipt: Receipt, shard: int) -> np.ndarray | None:
        """Size and sha256; returns the bytes, where they could be read."""
        written = receipt.files[name]
        size = self.files[name].num_bytes if name in self.files else 0
        if name in self.files and size != written.num_bytes:
            self.problem(name, f"has {size:,} bytes instead of {written.num_bytes:,}", shard)
            return None
        try:
            content = read_bytes(self.path / name)
        except (InputError, OSError) as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            why = "No such file or directory" if missing else error
            self.problem(name, f"cannot be read: {why}", shard)
            return None
        self.num_bytes += size
        if hashlib.sha256(content.data).hexdigest() != written.sha256:
            self.problem(name, "its sha256 is not the one in the receipt", shard)
        return content

    def _check_chunks(
        self, name: str, array: ShardedArray, shard: int, content: np.ndarray | None
    ) -> None:
        """Index and chunks by their own checksums: says where in the shard the damage is."""
        try:
            array.check_shard(shard, content)
        except _DAMAGE as error:
            self.problem(name, str(error).removeprefix(f"{self.path}/"), shard)

    def check_strangers(self, known: set[str]) -> None:
        known |= {MANIFEST, CHECKSUMS, LOCK_FILE}
        if (self.path / CHECKSUMS).exists():
            of_the_hub = ("README.md", ".gitattributes", ".cache/huggingface/")
            for name in self.files:
                if name not in known and not name.startswith(of_the_hub):
                    self.warnings.append(f"{name} does not belong to the store")


def _shard_of(name: str, num_shards: int) -> int | None:
    for shard in (int(digits) for digits in [name[-11:-5]] if digits.isdigit()):
        if name == f"receipts/shard-{shard:06d}.json" and shard < num_shards:
            return shard
    return None


def _arrays_of(
    store: FeatureStore | LatentStore, arrays: dict[str, ShardedArray], shard: int
) -> dict[str, ShardedArray]:
    """Of these the ones that hold a shard: those of its bucket, where there are buckets."""
    if not isinstance(store, LatentStore) or not store.manifest.identity.buckets:
        return arrays
    first = np.flatnonzero(store.rows // store.manifest.layout.rows_per_shard == shard)[:1]
    names = {name for bucket in store.buckets[first] for name in store.names(int(bucket))}
    return {name: array for name, array in arrays.items() if name in names}


def _entries(store: FeatureStore | LatentStore) -> Callable[[int], tuple[int, int]]:
    """Shard -> entries and rows that the tables put there."""
    layout = store.manifest.layout
    if isinstance(store, LatentStore):
        counts = np.bincount(store.rows // layout.rows_per_shard, minlength=layout.num_shards)
        return lambda shard: (int(counts[shard]), int(counts[shard]))
    shards = store.captions["shard"].to_numpy()
    rows = store.captions["num_tokens"].to_numpy()
    entries = np.bincount(shards, minlength=layout.num_shards)
    tokens = np.bincount(shards, weights=rows, minlength=layout.num_shards)
    return lambda shard: (int(entries[shard]), int(tokens[shard]))


def _caption_problems(store: FeatureStore) -> Iterator[str]:
    captions, identity, layout = store.captions, store.manifest.identity, store.manifest.layout
    if captions.num_rows != identity.captions.num_captions:
        yield f"has {captions.num_rows} rows; the manifest says {identity.captions.num_captions}"
        return
    if fingerprint(captions["text"]) != identity.captions.fingerprint:
        yield "its texts are not those of the manifest's fingerprint"
    starts, stops, num, shards = (
        captions[name].to_numpy() for name in ("row_start", "row_stop", "num_tokens", "shard")
    )
    if not np.array_equal(captions["caption_id"].to_numpy(), np.arange(len(store))):
        yield "caption_id is not 0, 1, 2 and so on"
    if not np.array_equal(stops - starts, num) or num.sum() != layout.num_rows:
        yield f"rows do not add up to num_tokens, or not to the manifest's {layout.num_rows}"
    if (starts[1:] < stops[:-1]).any() or starts.min() < 0:
        yield "rows of two captions overlap"
    if not np.array_equal(starts // layout.rows_per_shard, shards) or not np.array_equal(
        (stops - 1) // layout.rows_per_shard, shards
    ):
        yield "rows lie in another shard than the one named"
    ids = store.samples["caption_ids"].combine_chunks().values.to_numpy()
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(store)):
        yield f"samples.parquet names captions {ids.min()} to {ids.max()}"
