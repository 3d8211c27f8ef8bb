"""The order of samples, and loaders that follow it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch": ["Batch", "PaddedBatch", "on_device"],
        "dataset": ["StorePair", "SampleIndex", "by_shape", "check_joined", "open_pairs"],
        "loader": ["PaddedLoader", "PackedLoader"],
        "sampler": ["BatchPartition", "BucketSampler", "MixtureSampler", "make_sampler"],
    },
)
