"""Manifests: what of their numbers cannot be, whatever the files say."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from ....schemas import ConditioningManifest, FeatureManifest, LatentManifest, Mixes
from .tables import layout_faults

_MAX_AXES = 8


def manifest_faults(manifest: Any, num_entries: int) -> Iterator[str]:
    """What of a manifest cannot be.

    Args:
        num_entries: captions or samples, as the manifest says.
    """
    layout = manifest.layout
    yield from layout_faults(layout)
    if layout.num_shards > num_entries:
        yield f"layout: {layout.num_shards:,} shards for {num_entries:,} entries"
    counts = [(each.num_shards, each.num_rows) for each in (*manifest.grown_from, layout)]
    if any(a[0] > b[0] or a[1] > b[1] for a, b in pairwise(counts)):
        yield f"grown_from: shards and rows are {counts}; expected no fewer each time"
    if isinstance(manifest, FeatureManifest):
        yield from _feature_faults(manifest)
    if isinstance(manifest, LatentManifest):
        yield from _latent_faults(manifest)
    if isinstance(manifest, ConditioningManifest):
        yield from _conditioning_faults(manifest)


def _feature_faults(manifest: FeatureManifest) -> Iterator[str]:
    from ...codecs.registry import CODECS

    identity, codec = manifest.identity, manifest.codec
    layers, highest = identity.layers, identity.model.num_layers + 1
    ascending = all(a < b for a, b in pairwise(layers))
    if not ascending or layers[0] < 0 or (identity.mixes is None and layers[-1] > highest):
        yield f"identity.layers is {layers}; expected ascending numbers of 0 to {highest}"
    if CODECS[codec.name].fits and codec.fit is None:
        yield f"codec: {codec.name} is not fitted"
    if not {*codec.exact_layers} <= {*layers}:
        yield f"codec: exact_layers {list(codec.exact_layers)} are not among {layers}"
    if identity.mixes is not None:
        yield from _mixes_faults(identity.mixes)


def _mixes_faults(mixes: Mixes) -> Iterator[str]:
    for name in ("weights", "basis", "coefficients"):
        if not np.isfinite(getattr(mixes, name)).all():
            yield f"identity.mixes.{name} holds numbers that are not finite"


def _latent_faults(manifest: LatentManifest) -> Iterator[str]:
    identity, num_samples = manifest.identity, manifest.identity.samples.num_samples
    shapes = [bucket.shape for bucket in identity.buckets] or [identity.shape]
    if min(map(min, shapes)) < 1 or shapes[0] != identity.shape:
        yield f"identity: shapes are {shapes}; expected positive ones, the first {identity.shape}"
    for name in ("scale", "shift"):
        values = np.atleast_1d(np.asarray(getattr(identity, name), np.float64))
        if not np.isfinite(values).all() or len(values) not in (1, identity.shape[0]):
            yield f"identity.{name} is {values}; expected one finite number, or one per channel"
    dropped = identity.dropped
    if any(a >= b for a, b in pairwise(dropped)) or not (
        not dropped or (dropped[0] >= 0 and dropped[-1] < num_samples)
    ):
        yield f"identity.dropped: expected ascending samples of 0 to {num_samples - 1}"


def _conditioning_faults(manifest: ConditioningManifest) -> Iterator[str]:
    tensors = manifest.identity.tensors
    names = [tensor.name for tensor in tensors]
    if len({*names}) < len(names) or manifest.identity.rows not in names:
        yield f"identity.tensors: {names}; expected each once, among them {manifest.identity.rows}"
    for tensor in tensors:
        if min(tensor.shape, default=1) < 1 or len(tensor.shape) > _MAX_AXES:
            yield f"identity.tensors: {tensor.name} is {tensor.shape}"
