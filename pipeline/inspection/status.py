"""Progress of a store, from its files alone: any shell can ask while others write."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ...schemas import LockOwner, Report, Summary
from ...schemas.files import is_local, list_names, locate
from ..executor.progress import progress_line
from ..store.documents import MANIFEST, StoreError
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.lock import is_dead, read_driver
from ..store.open import open_store
from .describe import list_quarantined
from .following import budget_details, budget_facts, is_run, run_status

RECENT_SECONDS = 600.0
"""Rates and workers are taken from this long before the newest receipt."""
_PRIVATE = {"token", "begun", "beats"}  # keys of a driver's file that are for drivers only


def status(path: str | os.PathLike[str]) -> Report:
    """Report the progress of a store that is being planned or filled, or is complete; or of a run
    that reads an object store, or a store with a disk budget.

    Raises:
        StoreError: no store there, and no process at work on one.
    """
    if is_local(locate(path)) and is_run(locate(path)):
        return run_status(locate(path))
    try:
        store = open_store(path)
    except StoreError:
        place = locate(path)
        driver = read_driver(place)
        if driver is None or MANIFEST in list_names(place):
            raise
        return _planned(place, driver)
    layout, receipts, quarantined = store.manifest.layout, store.receipts(), store.quarantined()
    remaining = {*store.remaining()}
    written = {shard: receipt for shard, receipt in receipts.items() if shard not in remaining}
    rows = sum(receipt.num_rows for receipt in written.values())
    entries = sum(receipt.num_entries for receipt in written.values())
    unit = "samples" if isinstance(store, LatentStore) else "captions"
    # A receipt is written with its shard; times are those of the file system.
    changed = store.receipt_times()
    times = {shard: changed[shard] for shard in written}
    newest = max(times.values(), default=0.0)
    recent = sorted(
        (shard for shard, at in times.items() if newest - at <= RECENT_SECONDS),
        key=times.__getitem__,
    )
    workers = {written[shard].worker for shard in recent}
    # From the end of the first recent shard to the end of the last: the first is not counted.
    elapsed = newest - (times[recent[0]] if recent else newest)
    counted = sum(written[shard].num_rows for shard in recent[1:])
    entries_counted = sum(written[shard].num_entries for shard in recent[1:])
    rate = counted / elapsed if elapsed > 0 else 0.0
    driver = read_driver(store.path)
    left = layout.num_rows - rows
    details = {
        "path": str(store.path),
        "state": store.manifest.status,
        "shards": len(written),
        "shards_total": layout.num_shards,
        unit: entries,
        f"{unit}_total": len(store),
        "rows": rows,
        "rows_total": layout.num_rows,
        "bytes": sum(f.num_bytes for r in written.values() for f in r.files.values()),
        f"{unit}_per_second": entries_counted / elapsed if elapsed > 0 else 0.0,
        "rows_per_second": rate,
        "eta_seconds": left / rate if rate and left else None,
        "seconds_since_last_shard": max(0.0, time.time() - newest) if written else None,
        "workers": sorted(workers),
        "quarantined": {shard: q.reason for shard, q in sorted(quarantined.items())},
        "driver": None if driver is None else driver.model_dump(exclude=_PRIVATE),
        "driver_is_dead": None if driver is None else is_dead(driver),
    }
    if isinstance(store, FeatureStore) and store.has_budget:
        details |= budget_details(store) | {"eta_seconds": None}
    return Report(_facts(store.path, unit, details), details)


def _planned(path: Any, driver: LockOwner) -> Report:
    """The status of a store that has no manifest yet."""
    dead = is_dead(driver)
    details = {
        "path": str(path),
        "state": "planning",
        "driver": driver.model_dump(exclude=_PRIVATE),
        "driver_is_dead": dead,
    }
    state = (
        f"nothing yet; its driver died ({_who(details)}); rerun the same command to start again"
        if dead
        else f"being planned by {_who(details)}"
    )
    return Report(Summary(f"{path}", {"state": state}), details)


def _facts(path: Any, unit: str, details: Mapping[str, Any]) -> Summary:
    """The status in words."""
    share = details["rows"] / max(1, details["rows_total"])
    line = {
        **details,
        "store": locate(path).name,
        "workers": len(details["workers"]),
        "errors": 0,
        "quarantined": len(details["quarantined"]),
    }
    items = {
        "state": _state(details),
        "progress": progress_line(line, unit),
        "rows": f"{details['rows']:,} of {details['rows_total']:,} ({share:.0%})",
    }
    if details["state"] != "complete":
        since = details["seconds_since_last_shard"]
        if since is not None:
            items["last shard"] = f"{timedelta(seconds=round(since))} ago"
        if details["rows_per_second"]:
            items["speed"] = f"that of the {RECENT_SECONDS / 60:.0f} minutes before the last shard"
    if details["state"] == "budget":
        items |= budget_facts(details)
    if details["quarantined"]:
        items["quarantined"] = list_quarantined(details["quarantined"])
    return Summary(f"{path}", items)


def _state(details: Mapping[str, Any]) -> str:
    driver = details["driver"]
    if details["state"] == "complete":
        return "complete"
    if driver is None:
        return "stopped; rerun the command that makes it to resume"
    if details["driver_is_dead"]:
        return f"its driver died ({_who(details)}); rerun the same command to resume"
    return f"being written by {_who(details)}"


def _who(details: Mapping[str, Any]) -> str:
    driver = details["driver"]
    return f"process {driver['pid']} on {driver['host']}, since {driver['started']}"
