"""``budget.json`` of a store and ``position.json`` of a run: what each tells the other."""

import hashlib
import json
from typing import Any

from pydantic import Field

from .contract import Contract
from .errors import InputError
from .seeds import RANDOM_VERSION
from .train import TrainConfig

BUDGET = "budget.json"
"""Name of the document in a store."""
POSITION = "position.json"
"""Name of the document in a run directory."""
_DECISIVE: Any = {
    "seed": True,
    "data": {
        **dict.fromkeys(("batch_size", "caption_dropout", "order", "window"), True),
        "select": {"filter", "caption_weights"},
        "mixture": {"__all__": {"proportion": True, "select": {"filter", "caption_weights"}}},
    },
    "validation": {"share", "num_samples", "seed"},
}
"""Keys of a configuration that decide which samples come when."""


class FollowedRun(Contract):
    """A run that extraction follows."""

    output: str
    """The run directory."""
    order: str
    """sha256 over what decides which samples it reads, and in which order."""
    step: int = Field(ge=0)
    """Steps that it had done when this was written."""
    steps: int = Field(ge=1)
    """Steps that it will do."""
    steps_ahead: int = Field(ge=0)
    """Steps that it can do before it comes to a shard that is not on disk."""
    ended: bool


class StoreBudget(Contract):
    """``budget.json``: the disk budget of a store, and the runs whose reading it follows."""

    num_bytes: int = Field(ge=1)
    """Bytes that all files of the store may take."""
    kept: list[int]
    """Shards that are never evicted: those of the null caption and of validation samples."""
    runs: list[FollowedRun]
    waits_for: str | None = None
    """Output of the slowest run, if no shard can be written before it goes on."""
    waited_seconds: float = Field(0.0, ge=0)
    """Time that extraction has waited for runs since it was started."""


class FetchCounts(Contract):
    """What the main process of a run has fetched since the run was started or resumed."""

    fetched_bytes: int = Field(ge=0)
    """Bytes read from stores behind URLs, or by way of the cache from a slow disk."""
    fetch_requests: int = Field(ge=0)
    """Requests for parts of files, with those that failed."""
    fetch_retries: int = Field(ge=0)
    """Requests that failed and were repeated."""
    cached_bytes: int = Field(ge=0)
    """Bytes read from ``data.cache`` instead."""
    cache_faults: int = Field(ge=0)
    """Chunks that the cache held damaged, or had no room for."""


class RunPosition(Contract):
    """``position.json``: how far a run has read its stores, where these are fetched or have a disk
    budget."""

    step: int = Field(ge=0)
    """Steps done; samples of earlier steps are not read again unless the run falls back to a
    checkpoint."""
    steps: int = Field(ge=1)
    """Steps that it will do."""
    order: str
    """sha256 over what decides which samples it reads, and in which order."""
    ended: bool
    """True once the last checkpoint is written."""
    waits_for: dict[str, list[int]] = Field(default_factory=dict)
    """Path of a store -> shards that reading waits for."""
    open_shards: dict[str, list[int]] = Field(default_factory=dict)
    """Path of a store with a disk budget -> shards whose files the run holds open: the disk gets
    their space back when it closes them."""
    waiting_since: str | None = None
    """Time at which it began to wait, UTC."""
    waited_seconds: float = Field(0.0, ge=0)
    """Time that steps have waited for data since the run was started or resumed."""
    fetched: FetchCounts | None = None
    """None if all stores are read as files."""


def order_fingerprint(config: TrainConfig) -> str:
    """sha256 over what decides which samples a run reads, and in which order."""
    decisive = config.model_dump(mode="json", include=_DECISIVE)
    decisive["random_version"] = config.random_version or RANDOM_VERSION
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def check_order(config: TrainConfig, path: str) -> None:
    """Refuse a run that reads any caption at any time.

    Args:
        path: of the store, for the message.

    Raises:
        InputError: it does.
    """
    if config.data.order != "shards":
        raise InputError(
            f"{config.output} has data.order={config.data.order}, which reads any caption at any "
            f"time; {path} has a disk budget, for which shards must be read one after the other: "
            "set data.order=shards"
        )
