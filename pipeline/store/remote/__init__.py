"""Shards that are fetched rather than mapped: from object stores, or from slow disks by way of a
cache."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cache": ["ChunkCache", "cache_folder"],
        "chunks": ["ReadAhead", "RemoteChunks"],
        "clients": ["open_client"],
        "transfers": ["TransferCounts", "Transfers"],
    },
)
