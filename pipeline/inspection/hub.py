"""A finished store on the Hugging Face Hub: its card, and how it gets there."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, DatasetCardData, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ...schemas import LOCK_FILE, InputError, parse
from ...schemas.files import is_local, list_files
from ...schemas.units import format_bytes
from ..store.documents import CHECKSUMS, MANIFEST
from ..store.features import FeatureStore
from ..store.latents import LatentStore
from ..store.open import open_store
from .describe import inspect

CARD = "README.md"
MAX_FILES = 100_000
"""Of a repository of the Hub (https://huggingface.co/docs/hub/storage-limits)."""
_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    HFValidationError,
    OfflineModeIsEnabled,
)
"""With what lies under the first, OSError and the error of huggingface_hub's HTTP client, of which
there are several: no connection is none of the Hub's errors."""


@dataclass(frozen=True, repr=False)
class Push:
    """What goes to the Hub, or went there.

    Attributes:
        repo: ``name/repository``.
        private: whether a new repository is.
        card: README.md.
        files: of the store, by path, with their bytes.
        left: files in its folder that are not the store's, and stay.
        url: of the repository; None before it is there.
    """

    repo: str
    private: bool
    card: str
    files: dict[str, int]
    left: list[str]
    url: str | None = None

    def __repr__(self) -> str:
        size = f"{len(self.files):,} files, {format_bytes(sum(self.files.values()))}"
        who = "private" if self.private else "public"
        if self.url is not None:
            folder = self.repo.rpartition("/")[2]
            return (
                f"{self.url}: {size}\nTo have it elsewhere:\n"
                f"  hf download {self.repo} --repo-type dataset --local-dir {folder}"
            )
        folders: dict[str, list[int]] = {}
        for name, num_bytes in self.files.items():
            parts = name.split("/")
            folders.setdefault("/".join(parts[:2]) if parts[2:] else parts[0], []).append(num_bytes)
        lines = [
            f"  {name}{f': {len(sizes):,} files' if len(sizes) > 1 else ''}, "
            f"{format_bytes(sum(sizes))}"
            for name, sizes in folders.items()
        ]
        lines += [f"  not the store's, and left out: {name}" for name in self.left]
        return "\n".join([f"{self.repo} ({who} if it is new): {size}", *lines, "", self.card])


def push(
    path: str | Path,
    repo: str,
    *,
    public: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    report: Callable[[str], None] = print,
) -> Push:
    """Upload a finished store to a dataset repository of the Hub, which is made where missing.

    The manifest and the card go last and together: what is there before them is no store yet.
    Called again after it was stopped, it goes on: files that are there are not sent again. A store
    that grew is pushed to where it was.

    Args:
        path: folder of the store.
        repo: ``name/repository``.
        public: whether a repository that is made is.
        license: of the data, by the Hub's names; default: the card says that none is stated.
        dry_run: only say what would be done; nothing is sent.
        report: takes one line of text at a time.

    Raises:
        InputError: the store is unfinished or not local; the repository holds another one; the Hub
            cannot be reached, or refuses.
    """
    store = open_store(path)
    if not is_local(store.path):
        raise InputError(f"{store.path} is not on a disk of this machine; copy it there first")
    files, left = _choose(store)
    pushed = Push(repo, not public, make_card(store, repo, license), files, left)
    if dry_run:
        return pushed
    api = HfApi(library_name="semroute")
    try:
        url = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        _check_repository(api, repo, store)
        report(f"{len(files):,} files, {format_bytes(sum(files.values()))}, to {url}")
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=store.path,
            ignore_patterns=[*left, MANIFEST],
            commit_message="Shards and tables",
        )
        manifest = store.path / MANIFEST
        api.create_commit(
            repo,
            [
                CommitOperationAdd(MANIFEST, manifest.read_bytes()),
                CommitOperationAdd(CARD, pushed.card.encode()),
            ],
            repo_type="dataset",
            commit_message="Manifest and card: the store is whole",
        )
    except _ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "Run the same command again: it goes on where it stopped."
        if status in (401, 403, 404):
            remedy = "Log in with `hf auth login`, with a token that may write there."
        raise InputError(f"{repo}: {type(error).__name__}: {error}\n{remedy}") from error
    return Push(repo, not public, pushed.card, files, left, str(url))


def _choose(store: FeatureStore | LatentStore) -> tuple[dict[str, int], list[str]]:
    """The store's files with their bytes, and what else is in its folder."""
    remaining = store.remaining()
    if not store.is_complete or remaining:
        raise InputError(
            f"{store.path} is not finished: {len(remaining)} of "
            f"{store.manifest.layout.num_shards} shards are to be written. Run the command that "
            "made it once more, then push it."
        )
    found = list_files(store.path)
    known = {MANIFEST, CHECKSUMS, *(store.checksums.files if store.checksums else ())}
    known |= {name for receipt in store.receipts().values() for name in receipt.files}
    known |= {name for name in found if name.startswith(("receipts/", "quarantine/"))}
    if store.checksums is None:  # of an early version, which listed nothing
        known |= {name for name in found if name.startswith(store.group)}
        known |= {name for name in found if name.endswith(".parquet")}
    files = {name: entry.num_bytes for name, entry in found.items() if name in known - {LOCK_FILE}}
    if len(files) > MAX_FILES:
        raise InputError(
            f"{store.path} has {len(files):,} files, but the Hub takes {MAX_FILES:,} in a "
            "repository. Make it with a larger --shard-size, or rewrite it with one."
        )
    return files, sorted(set(found) - set(files))


def _check_repository(api: HfApi, repo: str, store: FeatureStore | LatentStore) -> None:
    """Refuse a repository of another store."""
    try:
        there = api.hf_hub_download(repo, MANIFEST, repo_type="dataset", force_download=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return
    known: list[Any] = [store.manifest.begun()]
    while getattr(known[-1], "grown_from", None):
        known.append(known[-1].before_growth())
    try:
        document = json.loads(Path(there).read_text("utf-8"))
        found = parse(type(store.manifest), document, MANIFEST).begun()
    except ValueError:  # of the other kind, or nothing that we know
        found = None
    if found not in known:
        raise InputError(
            f"{repo} holds another store than {store.path}. Name another repository, or delete "
            "that one first."
        )


def make_card(store: FeatureStore | LatentStore, repo: str, license: str | None = None) -> str:
    """README.md of a store's repository: what its manifest and receipts say, and how to read it."""
    features = isinstance(store, FeatureStore)
    facts = inspect(store.path).facts.items
    rows = {key: value for key, value in facts.items() if key != "state"}
    tables = ("captions", "samples") if features else ("samples",)
    data = DatasetCardData(
        license=license,
        pretty_name=repo.rpartition("/")[2],
        tags=["semroute", "zarr", "hidden-states" if features else "latents"],
        configs=[{"config_name": name, "data_files": f"{name}.parquet"} for name in tables],
    )
    what = (
        "Hidden states of the layers of a frozen LLM over captions"
        if features
        else "Latents of images"
    )
    stated = license or "not stated; ask whoever uploaded this before you use it"
    return f"""---
{data.to_yaml()}
---

# {data.pretty_name}

{what}, written by semroute as a sharded Zarr v3 store, for
[Semantic Routing](https://arxiv.org/abs/2602.03510).

| | |
|---|---|
{chr(10).join(f"| {key} | {_cell(value)} |" for key, value in rows.items())}
| licence | {stated} |

## Read it

```bash
hf download {repo} --repo-type dataset --local-dir {data.pretty_name}
semroute inspect {data.pretty_name}
semroute verify {data.pretty_name}
```

```python
import semroute

{_example(store, str(data.pretty_name))}
```

Its arrays are read by any Zarr library, its tables by any that reads Parquet:

```python
import pyarrow.parquet
import zarr

group = zarr.open_group("{data.pretty_name}/{store.group}", mode="r")
print({{name: array.shape for name, array in group.arrays()}})
samples = pyarrow.parquet.read_table("{data.pretty_name}/samples.parquet")
```

`manifest.json` says how it was made and what its codes mean.
"""


def _example(store: FeatureStore | LatentStore, folder: str) -> str:
    if isinstance(store, LatentStore):
        return (
            f'store = semroute.open_latents("{folder}")\n'
            "print(store.read([0]).shape)  # samples, channels, height, width"
        )
    return (
        f'store = semroute.open_features("{folder}")\n'
        "caption = store[1]\n"
        "print(caption.text, caption.hidden.shape)  # tokens, layers, width"
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
