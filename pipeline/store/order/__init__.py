"""The samples and captions of stores that runs train on, and the order in which they come.

Extraction must know the order too, to write shards as they are read: so it is here, and not in the
trainer.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["StorePair", "SampleIndex", "by_shape", "check_joined", "open_pairs"],
        "sampler": ["BatchPartition", "BucketSampler", "MixtureSampler", "make_sampler"],
    },
)
