"""One task per shard: in this process, or on the workers of a Dask cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": [
            "Cluster",
            "DiskFullError",
            "Interrupted",
            "Writing",
            "num_cpus",
            "report_progress",
            "worker_name",
        ],
        "connect": ["find_cluster"],
        "progress": ["Meter"],
        "workers": ["look_at_workers", "own_device"],
    },
)
