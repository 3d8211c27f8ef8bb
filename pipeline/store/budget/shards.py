"""Files of a store with a disk budget: its document, and shards that go.

A shard is on disk if it has a receipt and all its files; it is evicted if it has a receipt, and not
all of them. Files appear by a rename and go by removing them whole; receipts stay.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ....schemas import BUDGET, StoreBudget
from ....schemas.files import inside, list_files, remove
from ..base import Store
from ..documents import MANIFEST, write_contract


def enter_budget(store: Store[Any], budget: StoreBudget) -> None:
    """Let shards of a store come and go from now on."""
    write_contract(store.path / BUDGET, budget)
    _set_status(store, "budget")


def leave_budget(store: Store[Any]) -> None:
    """Make a store an unfinished one again, of which evicted shards remain to be written."""
    _set_status(store, "extracting")
    remove(store.path / BUDGET)


def _set_status(store: Store[Any], status: str) -> None:
    if store.manifest.status != status:
        store.manifest = store.manifest.model_copy(update={"status": status})
        write_contract(store.path / MANIFEST, store.manifest, early=True)


def evict(store: Store[Any], shards: Iterable[int]) -> None:
    """Remove the files of shards, and folders that are left empty; receipts stay."""
    for name in sorted(name for shard in shards for name in store.shard_files(shard)):
        file = inside(store.path, name)
        file.unlink(missing_ok=True)
        # c/SHARD/0/0: a folder of its own per shard, and one per dimension below.
        with suppress(OSError):  # a folder holds a file that is being written
            folder = file.parent
            while folder.name != "c":
                folder.rmdir()
                folder = folder.parent


def on_disk(store: Store[Any]) -> dict[int, int]:
    """Shards on disk -> bytes of their files."""
    absent = {*store.remaining()}
    return {
        shard: sum(file.num_bytes for file in receipt.files.values())
        for shard, receipt in store.receipts().items()
        if shard not in absent
    }


def remove_leftovers(store: Store[Any]) -> None:
    """Remove files of shards that are not on disk as a whole: of a writer, or of an eviction, that
    was killed."""
    kept = {name for shard in on_disk(store) for name in store.shard_files(shard)}
    found = {
        name
        for name in list_files(store.path, store.group)
        if "/c/" in name and not store.is_written_once(name)
    }
    for name in sorted(found - kept):
        inside(store.path, name).unlink(missing_ok=True)


def other_bytes(store: Store[Any]) -> int:
    """Bytes of everything in a store but its shards; receipts that are still to come are counted
    at the size of the largest."""
    entries = list_files(store.path)
    others = {
        name: entry.num_bytes
        for name, entry in entries.items()
        if "/c/" not in name or store.is_written_once(name)
    }
    sizes = [size for name, size in others.items() if name.startswith("receipts/")]
    to_come = store.manifest.layout.num_shards - len(sizes)
    return sum(others.values()) + to_come * (max(sizes, default=_RECEIPT_BYTES) + _SLACK_BYTES)


_RECEIPT_BYTES = 4_000
"""Size of a receipt, where none is written yet."""
_SLACK_BYTES = 200
"""Receipts differ in the digits of their numbers."""
