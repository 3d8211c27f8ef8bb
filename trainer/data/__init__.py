"""Which sample comes when, and a loader that obeys."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batch": ["Batch", "on_device"],
        "dataset": ["StorePair", "SampleIndex", "by_shape", "check_joined", "open_pairs"],
        "loader": ["PaddedLoader", "PackedLoader"],
        "sampler": ["MixtureSampler"],
    },
)
