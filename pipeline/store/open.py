"""Stores opened by path. Each kind is imported when one is opened."""

import os
from typing import TYPE_CHECKING

from ...schemas import FeatureManifest, LatentManifest
from ...schemas.files import locate
from .documents import StoreError, read_manifest

if TYPE_CHECKING:
    from .features import FeatureStore
    from .latents import LatentStore


def open_features(path: str | os.PathLike[str], *, complete: bool = True) -> "FeatureStore":
    """Open a feature store; see :meth:`.Store.open`."""
    from .features import FeatureStore

    return FeatureStore.open(path, complete=complete)


def open_latents(path: str | os.PathLike[str], *, complete: bool = True) -> "LatentStore":
    """Open a latent store; see :meth:`.Store.open`."""
    from .latents import LatentStore

    return LatentStore.open(path, complete=complete)


def open_store(path: str | os.PathLike[str]) -> "FeatureStore | LatentStore":
    """Open a store of either kind, finished or not.

    Raises:
        StoreError: no store there.
    """
    path = locate(path)
    features, latents = (
        manifest.model_fields["format"].default for manifest in (FeatureManifest, LatentManifest)
    )
    try:
        found = read_manifest(path, "feature").get("format")
    except (StoreError, OSError, AttributeError):
        found = features  # opening it raises the right error
    if found == features:
        return open_features(path, complete=False)
    if found == latents:
        return open_latents(path, complete=False)
    raise StoreError(
        f"{path}: the manifest's format is {found!r}; expected {features} or {latents}"
    )
