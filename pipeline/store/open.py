"""Stores opened by path. Each kind is imported when one is opened."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...schemas import ConditioningManifest, FeatureManifest, LatentManifest
from ...schemas.files import locate
from .documents import StoreError, read_manifest

if TYPE_CHECKING:
    from .conditioning import ConditioningStore
    from .features import FeatureStore
    from .latents import LatentStore


def open_features(
    path: str | os.PathLike[str], *, complete: bool = True, all_columns: bool = True
) -> "FeatureStore":
    """Open a feature store; see :meth:`.Store.open`."""
    from .features import FeatureStore

    return FeatureStore.open(path, complete=complete, all_columns=all_columns)


def open_followed(path: str | os.PathLike[str]) -> "FeatureStore":
    """Open a feature store to train on: a complete one, or one with a disk budget. Of its tables
    only what reading rows needs is read.

    Raises:
        StoreError: as :meth:`.Store.open`.
    """
    from .budget.followed import FollowedFeatureStore

    store = open_features(path, complete=False)
    if not store.has_budget:
        store.check_complete()
        store.check(all_columns=False)
        return store
    followed = FollowedFeatureStore(store.path, store.manifest)
    followed.check(all_columns=False)
    return followed


def open_latents(
    path: str | os.PathLike[str], *, complete: bool = True, all_columns: bool = True
) -> "LatentStore":
    """Open a latent store; see :meth:`.Store.open`."""
    from .latents import LatentStore

    return LatentStore.open(path, complete=complete, all_columns=all_columns)


def open_conditioning(
    path: str | os.PathLike[str], *, complete: bool = True, all_columns: bool = True
) -> "ConditioningStore":
    """Open a conditioning store; see :meth:`.Store.open`."""
    from .conditioning import ConditioningStore

    return ConditioningStore.open(path, complete=complete, all_columns=all_columns)


def open_store(
    path: str | os.PathLike[str],
) -> "FeatureStore | LatentStore | ConditioningStore":
    """Open a store of any kind, finished or not.

    Raises:
        StoreError: no store there.
    """
    path = locate(path)
    openers: dict[str, Callable[..., Any]] = {
        FeatureManifest.model_fields["format"].default: open_features,
        LatentManifest.model_fields["format"].default: open_latents,
        ConditioningManifest.model_fields["format"].default: open_conditioning,
    }
    try:
        found = read_manifest(path, "feature").get("format")
    except (StoreError, OSError, AttributeError):
        found, *_ = openers  # opening it raises the right error
    if found not in openers:
        raise StoreError(
            f"{path}: the manifest's format is {found!r}; expected one of {', '.join(openers)}"
        )
    store: FeatureStore | LatentStore | ConditioningStore = openers[found](path, complete=False)
    return store
