"""A folder shown as S3 on loopback, by the server of the benchmarks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmark_module import benchmark_module


@contextmanager
def serving(folder: Path) -> Iterator[Any]:
    """The server; what is under ``bucket`` in the folder has URLs ``s3://bucket/...``."""
    import s3fs

    server = benchmark_module("slow_store").SlowStore(folder).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        for each in s3fs.S3FileSystem._cache.values():
            s3fs.S3FileSystem.close_session(each.loop, each._s3)
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def is_shard(key: str) -> bool:
    """Whether an object is a shard's file."""
    return "/c/" in key and "/parameters/" not in key
