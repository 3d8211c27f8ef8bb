"""Batches, and loaders that read them in the order of samples."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch": ["Batch", "PaddedBatch", "on_device"],
        "loader": ["BatchPartition", "PaddedLoader", "PackedLoader"],
    },
)
