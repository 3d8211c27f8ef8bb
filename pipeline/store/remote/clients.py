"""Parts of files by name: from S3 by obstore, from other object stores by fsspec, from a disk.

Chosen by measurement (docs/benchmarks/object-store.md): obstore, which is written in Rust, answers
five times as many ranges per second as s3fs. Credentials, endpoint and region are those that s3fs
finds, so both read the same store.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ....schemas.files import StorageError, inside, is_local, open_file
from ..checks.watch import ChangedError

_VERSIONS = (
    *("ETag", "etag", "version_id", "generation", "mtime", "LastModified", "last_modified"),
    *("created", "ino"),
)
"""Names that file systems of fsspec give to what changes with a file."""
_CREDENTIALS_SECONDS = 300
_TIMEOUT = "120s"
_KEPT_OPEN = 64
"""Files of a disk that a client keeps open."""
_CHANGED = (
    "has changed since it was opened. Nothing may write to a store that is read; check it with "
    "semroute verify, then resume"
)


@dataclass(frozen=True)
class Part:
    """A part of a file.

    Attributes:
        content: uint8.
        version: tells this file from any other that was or will be under its name; empty: unknown.
    """

    content: np.ndarray
    version: str


class Client(Protocol):
    """Reads parts of the files under one folder."""

    def get(self, name: str, start: int, stop: int | None, version: str = "") -> Part:
        """One part of a file.

        Args:
            name: relative to the folder.
            start: first byte; a negative one counts from the end.
            stop: the byte after the last one; None: the end.
            version: that the file must have; empty: any.

        Raises:
            FileNotFoundError: no such file.
            ChangedError: it has another version.
            StorageError: it may not be read.
            Exception: whatever a network does; the same call may succeed later.
        """


def open_client(folder: Path) -> Client:
    """The client of a folder.

    Raises:
        StorageError: a package is missing.
    """
    if is_local(folder):
        return DiskClient(folder)
    system: Any = folder.fs  # type: ignore[attr-defined]
    base = str(folder.path).rstrip("/")  # type: ignore[attr-defined]
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return S3Client(system, base) if "s3" in protocols else FsspecClient(system, base)


class S3Client:
    """Objects of S3, or of what speaks its language.

    Args:
        system: s3fs's file system, which knows credentials, endpoint and region.
        base: bucket and key of the folder.
    """

    _process: ClassVar[int | None] = None
    """The first that used obstore: its threads do not survive a fork, and a forked process cannot
    start others. It reads by fsspec, which starts its own anew."""

    def __init__(self, system: Any, base: str) -> None:
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as error:
            raise StorageError(
                f"s3://{base}: reading a store from S3 needs the package obstore: "
                "pip install 'semroute[s3]'"
            ) from error
        self._obstore, self._system = obstore, system
        self._after_fork = FsspecClient(system, base)
        if S3Client._process is None:
            S3Client._process = os.getpid()
        bucket, _, self._prefix = base.partition("/")
        system.connect()
        endpoint, region = system.s3.meta.endpoint_url, system.s3.meta.region_name
        options: Any = {"timeout": _TIMEOUT}
        config: dict[str, Any] = {}
        if not endpoint.endswith(".amazonaws.com"):
            config["endpoint"] = endpoint
            options["allow_http"] = endpoint.startswith("http://")
        else:
            region = self._region(bucket) or region
        if system.anon:
            config["skip_signature"] = True
        else:
            config["credential_provider"] = self._credentials
        self._store = S3Store(
            bucket,
            region=region or "us-east-1",
            client_options=options,
            # Retries are ours, so that they are counted.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=120)},
            **config,
        )

    def _region(self, bucket: str) -> str | None:
        """The region of a bucket, if S3 says so."""
        try:
            found = self._system.call_s3("head_bucket", Bucket=bucket)
        except Exception:  # a right that reading objects does not need
            return None
        region: str | None = found.get("BucketRegion")
        return region

    def _credentials(self) -> dict[str, Any]:
        from fsspec.asyn import sync

        async def resolve() -> Any:
            found = await self._system.session.get_credentials()
            return None if found is None else await found.get_frozen_credentials()

        system = self._system
        key, secret, token = system.key, system.secret, system.token
        if not key:
            found = sync(system.loop, resolve)
            if found is None:
                raise StorageError(
                    "no credentials for S3: set AWS_PROFILE or AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or give the machine a role"
                )
            key, secret, token = found.access_key, found.secret_key, found.token
        expires = datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_SECONDS)
        return {
            "access_key_id": key,
            "secret_access_key": secret,
            "token": token,
            "expires_at": expires,
        }

    def get(self, name: str, start: int, stop: int | None, version: str = "") -> Part:
        if os.getpid() != S3Client._process:
            return self._after_fork.get(name, start, stop)
        errors = self._obstore.exceptions
        options: Any = {"range": {"suffix": -start} if start < 0 else (start, stop)}
        if version:
            options["if_match"] = version
        key = f"{self._prefix}/{name}" if self._prefix else name
        try:
            found = self._obstore.get(self._store, key, options=options)
            content = np.frombuffer(memoryview(found.bytes()), np.uint8)
        except errors.PreconditionError as error:
            raise ChangedError(f"{key} {_CHANGED}") from error
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise StorageError(f"{key} may not be read: {error}") from error
        return Part(content, str(found.meta["e_tag"] or ""))


class FsspecClient:
    """Files of any file system of fsspec."""

    def __init__(self, system: Any, base: str) -> None:
        self._system, self._base = system, base

    def get(self, name: str, start: int, stop: int | None, version: str = "") -> Part:
        path = f"{self._base}/{name}"
        found = ""
        if start < 0:  # whoever begins to read a file asks for its end
            info = self._system.info(path)
            tells = next((key for key in _VERSIONS if info.get(key) is not None), None)
            found = "" if tells is None else f"{info['size']} {info[tells]}"
        content = self._system.cat_file(path, start=start, end=stop)
        return Part(np.frombuffer(content, np.uint8), found)


class DiskClient:
    """Files of a file system of this machine, of which the last ones stay open: over a network, to
    open a file takes as long as to read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened = lru_cache(_KEPT_OPEN)(self._open)

    def get(self, name: str, start: int, stop: int | None, version: str = "") -> Part:
        path = self._folder / name
        state = os.stat(path, follow_symlinks=False)
        found = _version(state)
        if version and version != found:
            raise ChangedError(f"{path} {_CHANGED}")
        first = max(0, state.st_size + start) if start < 0 else start
        size = (state.st_size if stop is None else stop) - first
        try:
            content = os.pread(self._opened(name, found).number, size, first)
        except OSError:
            self._opened.cache_clear()  # a network file system may have dropped it
            raise
        return Part(np.frombuffer(content, np.uint8), found)

    def _open(self, name: str, version: str) -> "_Descriptor":
        path = inside(self._folder, name)
        with open_file(path) as file:
            if _version(os.fstat(file.fileno())) != version:
                raise ChangedError(f"{path} {_CHANGED}")
            opened = _Descriptor(os.dup(file.fileno()))
        # Nothing around a part is read, and all of it at once.
        os.posix_fadvise(opened.number, 0, 0, os.POSIX_FADV_RANDOM)
        return opened


def _version(state: os.stat_result) -> str:
    return f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns}"


class _Descriptor:
    """An open file, which is closed when nobody uses it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)
