"""One task per shard: in this process, or on the workers of a Dask cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": [
            "ClusterLostError",
            "Deferred",
            "DiskFullError",
            "Executor",
            "Interrupted",
            "num_cpus",
            "report_progress",
            "worker_name",
        ],
        "dask": ["DaskExecutor"],
        "local": ["LocalExecutor"],
        "progress": [
            "EntriesDone",
            "ProgressEvent",
            "ProgressReporter",
            "ShardFailed",
            "ShardWritten",
            "ShardsEnded",
            "ShardsStarted",
            "open_reporter",
        ],
        "workers": ["inspect_workers", "own_device"],
    },
)
