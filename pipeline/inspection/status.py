"""How far a store is, from its files alone: to be asked from any shell, while others write."""

import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from ...schemas import LockOwner, Report, Summary
from ...schemas.files import list_names, locate
from ...schemas.units import format_bytes
from ..store.documents import MANIFEST, StoreError
from ..store.features import FeatureStore
from ..store.lock import is_dead, read_driver
from ..store.open import open_store

RECENT_SECONDS = 600.0
"""Rates and workers are those of so long before the newest receipt."""
_SHOWN = 5
_OWN = {"token", "begun", "beats"}  # of a driver's file, for drivers alone


def status(path: str | os.PathLike[str]) -> Report:
    """Look at a store that is being filled, or was; or for which captions are being planned.

    Raises:
        StoreError: no store there, and nobody at work on one.
    """
    try:
        store = open_store(path)
    except StoreError:
        place = locate(path)
        driver = read_driver(place)
        if driver is None or MANIFEST in list_names(place):
            raise
        return _planned(place, driver)
    layout, receipts, quarantined = store.manifest.layout, store.receipts(), store.quarantined()
    remaining = store.remaining()
    written = {shard: receipt for shard, receipt in receipts.items() if shard not in {*remaining}}
    rows = sum(receipt.num_rows for receipt in written.values())
    entries = sum(receipt.num_entries for receipt in written.values())
    unit = "captions" if isinstance(store, FeatureStore) else "samples"
    # Receipts are written when their shard is; the clock is the file system's.
    changed = store.receipt_times()
    times = {shard: changed[shard] for shard in written}
    newest = max(times.values(), default=0.0)
    recent = [s for s, at in times.items() if newest - at <= RECENT_SECONDS]
    workers = {written[shard].worker for shard in recent}
    elapsed = newest - min((times[shard] for shard in recent), default=newest)
    # From the end of the first to the end of the last: what the first took is not in it.
    counted = sorted(recent, key=times.__getitem__)[1:]
    rate = sum(written[shard].num_rows for shard in counted) / elapsed if elapsed > 0 else 0.0
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
        "rows_per_second": rate,
        "eta_seconds": left / rate if rate and left else None,
        "seconds_since_last_shard": max(0.0, time.time() - newest) if written else None,
        "workers": sorted(workers),
        "quarantined": {shard: q.reason for shard, q in sorted(quarantined.items())},
        "driver": None if driver is None else driver.model_dump(exclude=_OWN),
        "driver_is_dead": None if driver is None else is_dead(driver),
    }
    return Report(_facts(store.path, unit, details), details)


def _planned(path: Any, driver: LockOwner) -> Report:
    """Of a store that has no manifest yet."""
    dead = is_dead(driver)
    details = {
        "path": str(path),
        "state": "planning",
        "driver": driver.model_dump(exclude=_OWN),
        "driver_is_dead": dead,
    }
    state = (
        f"nothing yet: its driver died ({_who(details)}): the same command begins anew"
        if dead
        else f"being planned by {_who(details)}"
    )
    return Report(Summary(f"{path}", {"state": state}), details)


def _facts(path: Any, unit: str, details: Mapping[str, Any]) -> Summary:
    share = details["rows"] / max(1, details["rows_total"])
    items = {
        "state": _state(details),
        "shards": f"{details['shards']:,} of {details['shards_total']:,}",
        unit: f"{details[unit]:,} of {details[f'{unit}_total']:,}",
        "rows": f"{details['rows']:,} of {details['rows_total']:,} ({share:.0%})",
        "bytes": format_bytes(details["bytes"]),
    }
    if details["state"] != "complete":
        since = details["seconds_since_last_shard"]
        if since is not None:
            items["last shard"] = f"{timedelta(seconds=round(since))} ago"
        if details["rows_per_second"]:
            items["speed"] = (
                f"{details['rows_per_second']:,.0f} rows/s of {len(details['workers'])} workers, "
                f"in the {RECENT_SECONDS / 60:.0f} minutes before"
            )
        if details["eta_seconds"]:
            items["left"] = f"{timedelta(seconds=round(details['eta_seconds']))} at that speed"
    if details["quarantined"]:
        shown = "; ".join(f"shard {s}: {r}" for s, r in [*details["quarantined"].items()][:_SHOWN])
        items["quarantined"] = f"{len(details['quarantined'])} shards: {shown}"
    return Summary(f"{path}", items)


def _state(details: Mapping[str, Any]) -> str:
    driver = details["driver"]
    if details["state"] == "complete":
        return "complete"
    if driver is None:
        return "stopped: the command that makes it continues it"
    if details["driver_is_dead"]:
        return f"its driver died ({_who(details)}): the same command continues it"
    return f"being written by {_who(details)}"


def _who(details: Mapping[str, Any]) -> str:
    driver = details["driver"]
    return f"process {driver['pid']} on {driver['host']}, since {driver['started']}"
