"""Lazy views of a feature store: functions that :class:`FeatureStore` has as methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .summary import model_name

if TYPE_CHECKING:
    from .features import FeatureStore

DASK_BYTES = 64_000_000
"""Bytes of a block of a lazy array, in float32."""


def to_dask(store: "FeatureStore", layers: Sequence[int] | None = None) -> Any:
    """All rows as a lazy dask array, float32 ``[rows, layers, H]``.

    Rows are those of the captions in store order, without what lies between them; a block is
    the captions of ``DASK_BYTES``, and is read and decoded when it is computed.

    Args:
        layers: LLM layers, default all that are stored.
    """
    import dask.array

    shape = (len(store.layer_positions(layers)), store.manifest.identity.model.width)
    rows = max(1, DASK_BYTES // (4 * shape[0] * shape[1]))
    cuts, counts = _cut(store.num_rows(range(len(store))), rows)

    def read(block: np.ndarray, store: "FeatureStore") -> np.ndarray:
        return store.read(np.arange(*block[0, 0, 0]), layers).numpy()

    ranges = np.stack([cuts[:-1], cuts[1:]], 1)[:, None, None]  # [blocks, 1, 1, 2]
    blocks = dask.array.from_array(ranges, chunks=(1, 1, 1, 2))
    return dask.array.map_blocks(
        read,
        blocks,
        store,
        dtype=np.float32,
        chunks=(tuple(map(int, counts)), *((size,) for size in shape)),
        drop_axis=3,
        meta=np.empty((0, 0, 0), np.float32),
    )


def to_xarray(store: "FeatureStore", layers: Sequence[int] | None = None) -> Any:
    """All rows as a lazy xarray Dataset: ``hidden`` of :meth:`to_dask` with named dimensions.

    Coordinates: ``layer`` (of the LLM), and for each ``row`` its ``caption`` (id), ``token``
    (id) and ``position`` in the caption.

    Args:
        layers: LLM layers, default all that are stored.

    Raises:
        ImportError: xarray is not installed.
    """
    import xarray

    counts = store.num_rows(range(len(store)))
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return xarray.Dataset(
        {"hidden": (("row", "layer", "channel"), to_dask(store, layers))},
        coords={
            "layer": list(store.layers if layers is None else layers),
            "caption": ("row", np.repeat(np.arange(len(store)), counts)),
            "token": ("row", store.captions["token_ids"].combine_chunks().flatten().to_numpy()),
            "position": ("row", np.arange(len(starts)) - starts),
        },
        attrs={
            "model": model_name(store),
            "template": store.manifest.identity.template.text,
            "codec": store.manifest.codec.name,
        },
    )


def _cut(num_rows: np.ndarray, rows_per_block: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of whole captions: the captions where they begin and end, and their rows.

    Captions of 3, 2, 4 and 1 tokens in blocks of 5 rows::

        caption   0     1   2       3
        row       0 1 2 3 4 5 6 7 8 9
        cuts      0         2         4    captions
        counts    5         5              rows
    """
    stops = np.cumsum(num_rows)
    bounds = np.arange(0, stops[-1] + rows_per_block, rows_per_block)
    cuts = np.unique([0, *np.searchsorted(stops, bounds, "right"), len(num_rows)])
    return cuts, np.diff(np.concatenate([[0], stops])[cuts])
