"""Stores with a disk budget: which shards runs need when, and reading that waits for them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "followed": ["FollowedFeatureStore"],
        "needs": ["ShardNeeds"],
        "schedule": ["Residents"],
        "shards": ["enter_budget", "evict", "leave_budget"],
    },
)
