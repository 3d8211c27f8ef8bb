"""How a run reads stores behind URLs and in file systems of programs (FUSE), and what it keeps on a
local disk: ``data.cache``."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.store.order.dataset import StorePair
from ...pipeline.store.remote.cache import ChunkCache, cache_folder
from ...pipeline.store.remote.chunks import KEPT_BYTES, ReadAhead
from ...schemas import DataConfig
from ...schemas.files import is_local, list_files, on_fuse
from ...schemas.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from ...pipeline.store.base import Store

WHOLE_BYTES = 1_000_000_000
"""Chunks of whole shards that are kept in memory, where there is no cache."""
_MARGIN = 1.25
"""Factor of what shards are expected to take: they differ in size."""


@dataclass(frozen=True)
class FetchPlan:
    """What of the stores of a run is fetched, and how.

    Attributes:
        data: the configuration.
        num_bytes: of all stores that are fetched.
        window_bytes: of the shards of captions that are mixed at a time; 0 for order ``random``.
        limit_bytes: that are kept, in the cache or in memory.
        whole_captions, whole_latents: whether shards are fetched whole.
    """

    data: DataConfig
    num_bytes: int
    window_bytes: int
    limit_bytes: int
    whole_captions: bool
    whole_latents: bool

    def describe(self) -> str:
        """What training will do, in one line."""
        data, size = self.data, format_bytes(self.num_bytes)
        needed = format_bytes(_MARGIN * self.window_bytes)
        how = "what a batch needs, many ranges at a time"
        if self.whole_captions:
            how = f"whole shards, up to {needed} at a time"
        elif self.window_bytes:
            how += f" (whole shards need data.cache with a size of {needed})"
        if data.cache is None:
            kept = " kept in memory" if self.whole_captions else ""
            return f"{size} to fetch: {how}{kept}; every epoch reads all of it again"
        if self.num_bytes <= self.limit_bytes:
            text = "all of it fits, so later epochs fetch nothing"
        else:
            share = self.limit_bytes / self.num_bytes
            text = f"{share:.0%} of it fits, and later epochs fetch the rest again"
        free = _free_bytes(Path(data.cache.folder))
        if free < self.limit_bytes:
            text += f"; only {format_bytes(free)} are free there"
        return f"{size}: {how}; cache in {data.cache.folder}, up to {data.cache.size}: {text}"


def plan_fetching(pairs: Sequence[StorePair], data: DataConfig) -> FetchPlan | None:
    """How stores are fetched; None if all are mapped."""
    stores = [store for store in _stores(pairs) if _is_fetched(store, data)]
    if not stores:
        return None
    sizes = {store: _num_bytes(store) for store in stores}
    latents = sum(size for store, size in sizes.items() if store.kind == "latent")
    window = 0.0
    if data.order == "shards":
        # One shard more than are mixed, of which one ends as another begins.
        shares = {s: (data.window + 1) / s.manifest.layout.num_shards for s in stores}
        window = sum(
            min(1.0, shares[store]) * size
            for store, size in sizes.items()
            if store.kind != "latent"
        )
    limit = WHOLE_BYTES if data.cache is None else parse_bytes(data.cache.size)
    by_shards = data.order == "shards"
    return FetchPlan(
        data,
        sum(sizes.values()),
        int(window),
        limit,
        whole_captions=by_shards and _MARGIN * window <= limit,
        # Images of a shard's captions lie anywhere among the latents.
        whole_latents=by_shards and _MARGIN * (window + latents) <= limit,
    )


def check_cache(data: DataConfig) -> None:
    """Refuse a folder of ``data.cache`` that cannot be a cache; nothing is written.

    Raises:
        InputError: it holds something else.
    """
    if data.cache is not None:
        cache_folder(data.cache.folder)


def fetch_stores(pairs: Sequence[StorePair], data: DataConfig) -> ReadAhead | None:
    """Let the stores of a run share what they fetch; None if nothing is fetched.

    Raises:
        InputError: the folder of ``data.cache`` cannot be a cache.
    """
    stores = [store for store in _stores(pairs) if _is_fetched(store, data)]
    plan = plan_fetching(pairs, data) if stores and data.order == "shards" else None
    if not stores:
        return None
    cache = None
    if data.cache is not None:
        size, replace = parse_bytes(data.cache.size), data.order == "shards"
        cache = ChunkCache(cache_folder(data.cache.folder), size, replace=replace)
    whole_captions = plan is not None and plan.whole_captions
    whole_latents = plan is not None and plan.whole_latents
    in_memory = whole_captions and cache is None
    ahead = ReadAhead(cache, kept_bytes=WHOLE_BYTES if in_memory else KEPT_BYTES)
    for store in stores:
        store.fetch_by(ahead, whole=whole_latents if store.kind == "latent" else whole_captions)
    return ahead


def _stores(pairs: Sequence[StorePair]) -> "Iterator[Store[Any]]":
    for pair in pairs:
        yield pair.features
        yield pair.latents
        if pair.conditioning is not None:
            yield pair.conditioning


def _is_fetched(store: "Store[Any]", data: DataConfig) -> bool:
    is_disk = is_local(store.path) and not on_fuse(store.path)
    return not store.has_budget and not (is_disk and data.cache is None)


def _num_bytes(store: "Store[Any]") -> int:
    """Of the store's arrays, by one listing."""
    return sum(entry.num_bytes for entry in list_files(store.path, store.group).values())


def _free_bytes(folder: Path) -> int:
    """Of the disk where a folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
