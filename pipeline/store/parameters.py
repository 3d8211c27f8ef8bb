"""The fitted arrays of a codec on disk: ``hidden.zarr/parameters``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from zarr.codecs import Crc32cCodec

from ...schemas import FeatureManifest
from ..codecs.base import Codec, digest_parameters
from ..codecs.registry import CODECS, open_codec
from .array import open_array
from .documents import StoreError

PARAMETERS = "parameters"
_DIMENSIONS = {
    "slope": ("layer", "channel"),
    "bias": ("layer", "channel"),
    "base": ("layer", "channel"),
    "follow": ("layer", "distance"),
    "matrix": ("layer", "channel_below", "channel"),
    "rotation": ("layer", "axis", "channel"),
}


def write_parameters(group: Any, parameters: Mapping[str, np.ndarray]) -> None:
    """Write fitted arrays, one chunk per layer, into a Zarr group; nothing if there are none."""
    if not parameters:
        return
    folder = group.create_group(PARAMETERS)
    for name, values in parameters.items():
        array = folder.create_array(
            name,
            shape=values.shape,
            chunks=(1, *values.shape[1:]),
            dtype=values.dtype,
            compressors=[Crc32cCodec()],
            fill_value=0,
            dimension_names=_DIMENSIONS[name],
        )
        array[...] = values


def read_codec(group: Path, manifest: FeatureManifest) -> Codec:
    """The codec that a manifest names, with its fitted arrays if it has any.

    Raises:
        StoreError: the arrays are not those that the manifest names.
    """
    spec, identity = manifest.codec, manifest.identity
    parameters: dict[str, np.ndarray] = {}
    if spec.fit is not None:
        folder = group / PARAMETERS
        names = CODECS[spec.name].fits
        parameters = {name: np.asarray(open_array(folder / name)[...]) for name in names}
        if digest_parameters(parameters) != spec.fit.sha256:
            raise StoreError(
                f"{folder} does not hold the fitted parameters of the codec (its sha256 is not "
                "the manifest's); put it back from a copy"
            )
    return open_codec(spec, identity.layers, identity.model.width, parameters)
