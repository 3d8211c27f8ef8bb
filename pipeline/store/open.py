"""Stores opened by path."""

import os
from typing import Any

from ...schemas.files import locate
from .documents import StoreError, read_manifest
from .features import FEATURES_FORMAT, FeatureStore
from .latents import LatentStore


def open_features(path: str | os.PathLike[str], *, complete: bool = True) -> FeatureStore:
    """Open a feature store; see :meth:`Ledger.open`."""
    return FeatureStore.open(path, complete=complete)


def open_store(path: str | os.PathLike[str]) -> FeatureStore | LatentStore:
    """Open a store of either kind, finished or not.

    Raises:
        StoreError: no store there.
    """
    path = locate(path)
    try:
        form = read_manifest(path, "feature").get("format")
    except (StoreError, OSError, AttributeError):
        form = FEATURES_FORMAT  # whose opening says what is wrong
    kinds: dict[str, Any] = {FEATURES_FORMAT: FeatureStore, "semroute.latents": LatentStore}
    if form not in kinds:
        raise StoreError(
            f"{path}: the manifest's format is {form!r}; expected {' or '.join(kinds)}"
        )
    store: FeatureStore | LatentStore = kinds[form].open(path, complete=False)
    return store


def open_latents(path: str | os.PathLike[str], *, complete: bool = True) -> LatentStore:
    """Open a latent store; see :meth:`Ledger.open`."""
    return LatentStore.open(path, complete=complete)
