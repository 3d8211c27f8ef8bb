"""Upload of a finished store to the Hugging Face Hub, and its dataset card."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

from ...schemas import InputError, parse
from ...schemas.escaping import in_markdown, without_secrets
from ...schemas.files import inside, is_local, read_file, scan
from ...schemas.json_file import read_json
from ...schemas.units import format_bytes
from ..store.base import Store
from ..store.conditioning import ConditioningStore
from ..store.documents import (
    AGAINST,
    CHECKSUMS,
    MANIFEST,
    QUARANTINE,
    RECEIPTS,
    shard_document,
)
from ..store.latents import LatentStore
from ..store.open import open_store
from .describe import inspect

CARD = "README.md"
_LEFT_OUT = "left out, as it is no file of the store: {}"
MAX_FILES = 100_000
"""Limit of a repository on the Hub (https://huggingface.co/docs/hub/storage-limits)."""
_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    HFValidationError,
    OfflineModeIsEnabled,
)
"""The bases of the Hub's HTTP error, OSError and that of the HTTP client, of which huggingface_hub
had several, so that connection errors are caught too."""


@dataclass(frozen=True, repr=False)
class Push:
    """An upload to the Hub, planned or done.

    Attributes:
        repo: ``name/repository``.
        private: whether a new repository is private.
        card: README.md.
        files: path -> bytes of the store's files.
        left_out: what else is in the store's folder, links among it, and is not uploaded.
        url: of the repository; None before the upload.
    """

    repo: str
    private: bool
    card: str
    files: dict[str, int]
    left_out: list[str]
    url: str | None = None

    def __repr__(self) -> str:
        size = f"{len(self.files):,} files, {format_bytes(sum(self.files.values()))}"
        who = "private" if self.private else "public"
        if self.url is not None:
            folder = self.repo.rpartition("/")[2]
            return (
                f"{self.url}: {size}\nTo download it:\n"
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
        lines += [f"  {_LEFT_OUT.format(name)}" for name in self.left_out]
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
    """Upload a finished store to a dataset repository of the Hub, which is created if missing.

    The manifest and the card go last and together: without them, the repository is no store yet.
    Call it again to resume: files that are there are not sent again. A store that grew is pushed to
    the repository that it was in.

    Args:
        path: folder of the store.
        repo: ``name/repository``.
        public: create a public repository instead of a private one.
        license: of the data, by its name on the Hub. Default: the card says that none is stated.
        dry_run: return what would be uploaded, and send nothing.
        report: called with each line of text.

    Raises:
        InputError: the store is unfinished or not local; the repository holds another store; the
            Hub cannot be reached, or refuses.
    """
    store = open_store(path)
    if not is_local(store.path):
        raise InputError(f"{store.path} is not on a disk of this machine; copy it there first")
    files, left_out = _choose(store)
    plan = Push(repo, not public, make_card(store, repo, license), files, left_out)
    if dry_run:
        return plan
    api = HfApi(library_name="semroute")
    try:
        url = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True)
        _check_repository(api, repo, store)
        report(f"{len(files):,} files, {format_bytes(sum(files.values()))}, to {url}")
        for name in left_out:
            report(_LEFT_OUT.format(name))
        # Each file by its name: a pattern may match more, or less, than was listed.
        api.create_commit(
            repo,
            [
                CommitOperationAdd(name, str(inside(store.path, name)))
                for name in files
                if name != MANIFEST
            ],
            repo_type="dataset",
            commit_message="Shards and tables",
        )
        api.create_commit(
            repo,
            [
                CommitOperationAdd(MANIFEST, read_file(store.path / MANIFEST)),
                CommitOperationAdd(CARD, plan.card.encode()),
            ],
            repo_type="dataset",
            commit_message="Manifest and card: the store is complete",
        )
    except _ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "Rerun the same command to resume."
        if status in (401, 403, 404):
            remedy = "Log in with `hf auth login`, with a token that may write to it."
        raise InputError(f"{repo}: {type(error).__name__}: {error}\n{remedy}") from error
    return replace(plan, url=str(url))


def _choose(store: Store[Any]) -> tuple[dict[str, int], list[str]]:
    """The store's files with their bytes, and the other files of its folder."""
    store.check_complete(files=True)
    store.check()
    found = scan(store.path)
    receipts, quarantined = store.receipts(), store.quarantined()
    known = {MANIFEST, CHECKSUMS, AGAINST}
    # An early version listed nothing.
    listed = found.files if store.checksums is None else store.checksums.files
    known |= {name for name in listed if store.is_written_once(name)}
    known |= {name for receipt in receipts.values() for name in receipt.files}
    known |= {shard_document(RECEIPTS, shard) for shard in receipts}
    known |= {shard_document(QUARANTINE, shard) for shard in quarantined}
    files = {name: e.num_bytes for name, e in found.files.items() if name in known}
    if len(files) > MAX_FILES:
        raise InputError(
            f"{store.path} has {len(files):,} files, but the Hub takes {MAX_FILES:,} per "
            "repository. Make the store with a larger --shard-size, or rewrite it with one."
        )
    others = [f"{name} ({kind})" for name, kind in found.others.items()]
    return files, sorted([*others, *(set(found.files) - set(files))])


def _check_repository(api: HfApi, repo: str, store: Store[Any]) -> None:
    """Refuse a repository that holds another store."""
    try:
        manifest = api.hf_hub_download(repo, MANIFEST, repo_type="dataset", force_download=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return
    known: list[Any] = [store.manifest.unfinished()]
    while getattr(known[-1], "grown_from", None):
        known.append(known[-1].before_growth())
    try:
        document = read_json(Path(manifest), follow=True)
        found = parse(type(store.manifest), document, MANIFEST).unfinished()
    except ValueError:  # a store of another kind, or no store
        found = None
    if found not in known:
        raise InputError(
            f"{repo} holds another store than {store.path}. Name another repository, or delete it "
            "first."
        )


_CONTENTS = {
    "feature": ("Hidden states of the layers of a frozen LLM over captions", "hidden-states"),
    "latent": ("Latents of images", "latents"),
    "conditioning": ("What a pipeline of diffusers gives its transformer for captions", "prompts"),
}
"""Kind of store -> what it holds, and a tag of the Hub."""


def make_card(store: Store[Any], repo: str, license: str | None = None) -> str:
    """README.md of a store's repository: what the store holds, and how to read it."""
    facts = inspect(store.path).facts.items
    rows = {key: value for key, value in facts.items() if key != "state"}
    what, tag = _CONTENTS[store.kind]
    tables = ("samples",) if isinstance(store, LatentStore) else ("captions", "samples")
    data = DatasetCardData(
        license=license,
        pretty_name=repo.rpartition("/")[2],
        tags=["semroute", "zarr", tag],
        configs=[{"config_name": name, "data_files": f"{name}.parquet"} for name in tables],
    )
    stated = in_markdown(license or "not stated; ask the uploader before you use it")
    card = f"""---
{data.to_yaml()}
---

# {in_markdown(str(data.pretty_name))}

{what}, written by semroute as a sharded Zarr v3 store, for
[Semantic Routing](https://arxiv.org/abs/2602.03510).

| | |
|---|---|
{chr(10).join(f"| {key} | {in_markdown(value)} |" for key, value in rows.items())}
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

Any Zarr library reads its arrays, and any Parquet library its tables:

```python
import pyarrow.parquet
import zarr

group = zarr.open_group("{data.pretty_name}/{store.group}", mode="r")
print({{name: array.shape for name, array in group.arrays()}})
samples = pyarrow.parquet.read_table("{data.pretty_name}/samples.parquet")
```

`manifest.json` records how it was made and what its codes mean.
"""
    return without_secrets(card)


def _example(store: Store[Any], folder: str) -> str:
    if isinstance(store, LatentStore):
        return (
            f'store = semroute.open_latents("{folder}")\n'
            "print(store.read([0]).shape)  # samples, channels, height, width"
        )
    if isinstance(store, ConditioningStore):
        return (
            f'store = semroute.open_conditioning("{folder}")\n'
            "print({name: values.shape for name, values in store.read([1]).items()})"
        )
    return (
        f'store = semroute.open_features("{folder}")\n'
        "caption = store[1]\n"
        "print(caption.text, caption.hidden.shape)  # tokens, layers, width"
    )
