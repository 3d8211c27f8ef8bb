"""The fitted arrays of a codec on disk: ``hidden.zarr/parameters``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from zarr.codecs import Crc32cCodec

from .array import open_array

FOLDER = "parameters"
_DIMENSIONS = {
    "slope": ("layer", "channel"),
    "bias": ("layer", "channel"),
    "base": ("layer", "channel"),
    "follow": ("layer", "distance"),
    "matrix": ("layer", "channel_below", "channel"),
    "rotation": ("layer", "axis", "channel"),
}


def write_parameters(group: Any, parameters: Mapping[str, np.ndarray]) -> None:
    """Write fitted arrays into a Zarr group, a chunk a layer; nothing where there are none."""
    if not parameters:
        return
    folder = group.create_group(FOLDER)
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


def read_parameters(group: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read them back, by name."""
    return {name: np.asarray(open_array(group / FOLDER / name)[...]) for name in names}
