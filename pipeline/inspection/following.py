"""What runs wait for: stores that they fetch, or one with a disk budget, which waits for them."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ...schemas import (
    BUDGET,
    POSITION,
    FetchCounts,
    Report,
    RunPosition,
    StoreBudget,
    Summary,
    parse,
)
from ...schemas.json_file import read_json
from ...schemas.units import format_bytes
from ..store.documents import read_budget
from ..store.features import FeatureStore
from ..store.lock import is_dead, read_driver


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run which publishes its position."""
    return (path / POSITION).exists()


def run_status(path: Path) -> Report:
    """How far a run is, which shards it waits for, and what it has fetched."""
    position = read_position(path)
    assert position is not None
    details = {
        "path": str(path),
        **position.model_dump(exclude={"order"}),
        "seconds_waiting": _seconds_since(position.waiting_since),
        "driver_is_dead": _driver_is_dead(path),
    }
    items = {
        "state": _state_of_run(path, position),
        "steps": f"{position.step:,} of {position.steps:,}",
        "waited": f"{timedelta(seconds=round(position.waited_seconds))} for data since it started",
    }
    if position.fetched is not None:
        items["fetched"] = _fetched(position.fetched)
    for store, shards in position.waits_for.items():
        items["waits for"] = f"shards {', '.join(map(str, shards))} of {store}"
        budget = read_budget(Path(store))
        items["extraction"] = _extraction(Path(store), budget)
    return Report(Summary(str(path), items), details)


def budget_details(store: FeatureStore) -> dict[str, Any]:
    """What a store with a disk budget adds to its status; plain JSON types."""
    budget = read_budget(store.path) or StoreBudget(num_bytes=1, kept=[], runs=[])
    absent = {*store.remaining()}
    runs = []
    for run in budget.runs:
        position = read_position(Path(run.output))
        found = run.model_dump(exclude={"order"})
        if position is not None:
            found |= {"step": position.step, "ended": position.ended}
            found["waits_for"] = position.waits_for.get(str(store.path.resolve()), [])
            found["seconds_waiting"] = _seconds_since(position.waiting_since)
            found["waited_seconds"] = position.waited_seconds
        found["state"] = _state_of_run(Path(run.output), position)
        runs.append(found)
    return {
        "budget_bytes": budget.num_bytes,
        "shards_evicted": len({*store.receipts()} & absent),
        "shards_kept": len(budget.kept),
        "waits_for": budget.waits_for,
        "waited_seconds": budget.waited_seconds,
        "runs": runs,
    }


def budget_facts(details: Mapping[str, Any]) -> dict[str, str]:
    """The same in words."""
    items = {
        "bytes": f"{format_bytes(details['bytes'])} of a budget of "
        f"{format_bytes(details['budget_bytes'])}",
        "shards": f"{details['shards']:,} of {details['shards_total']:,} on disk, "
        f"{details['shards_kept']:,} of them for good; {details['shards_evicted']:,} evicted",
    }
    if details["waits_for"] is not None:
        items["waits for"] = (
            f"{details['waits_for']}, the slowest run "
            f"({timedelta(seconds=round(details['waited_seconds']))} so far)"
        )
    for run in details["runs"]:
        text = f"{run['state']}; step {run['step']:,} of {run['steps']:,}"
        if not run["ended"]:
            text += f", {run['steps_ahead']:,} steps ahead of it are on disk"
        items[f"run {run['output']}"] = text
    return items


def read_position(run: Path) -> RunPosition | None:
    """Position of a run; None if it has not started."""
    try:
        return parse(RunPosition, read_json(run / POSITION), str(run / POSITION))
    except FileNotFoundError:
        return None


def _state_of_run(path: Path, position: RunPosition | None) -> str:
    if position is None:
        return "not started"
    if position.ended:
        return "ended"
    if _driver_is_dead(path):
        return "not running; rerun semroute train to resume"
    seconds = _seconds_since(position.waiting_since)
    if seconds is None:
        return "running"
    shards = [shard for shards in position.waits_for.values() for shard in shards]
    return f"has waited {seconds:.0f} s for shards {', '.join(map(str, shards))}"


def _fetched(counts: FetchCounts) -> str:
    text = f"{format_bytes(counts.fetched_bytes)} in {counts.fetch_requests:,} requests, "
    text += f"{counts.fetch_retries:,} of them retried" if counts.fetch_retries else "no retries"
    if counts.cached_bytes:
        text += f"; {format_bytes(counts.cached_bytes)} from the cache"
    if counts.cache_faults:
        text += f"; {counts.cache_faults:,} chunks damaged there, or without room"
    return text


def _extraction(store: Path, budget: StoreBudget | None) -> str:
    if _driver_is_dead(store):
        return "not running; rerun semroute extract to resume"
    if budget is None:
        return f"running, and there is no {BUDGET} yet"
    if budget.waits_for is not None:
        return f"waits for {budget.waits_for}, the slowest run"
    return "writes shards"


def _driver_is_dead(path: Path) -> bool:
    """True if the process that writes a store or a run has ended, or there is none; False if it is
    alive, or is on another machine."""
    driver = read_driver(path)
    return driver is None or is_dead(driver) is True


def _seconds_since(time: str | None) -> float | None:
    if time is None:
        return None
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
