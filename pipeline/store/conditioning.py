"""Conditioning stores: what a pipeline gives its transformer for each caption, exactly. Unlike
feature stores, with::

    conditioning.zarr/  a Zarr v3 group: one array per tensor of the pipeline

All arrays have the same shards and rows. A store is ragged if the transformer reads no rows but a
caption's own: the arrays then have one row per token, as hidden states have. Otherwise they have
one row per caption, padding included.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import (
    CONDITIONING_CAPTIONS_SCHEMA,
    MASK,
    ConditioningManifest,
    ConditioningTensor,
    Summary,
    write_whole,
)
from ...schemas.columns import numbers
from .array import ShardedArray, create_array, new_group
from .captions import CaptionStore
from .checks.metadata import StoredArray
from .documents import StoreError, prepare_folder, render_table, samples_schema, write_manifest
from .shard_file import ChunkSlices
from .views import summarise_conditioning

if TYPE_CHECKING:
    import torch


class ConditioningStore(CaptionStore[ConditioningManifest]):
    """Tensors of captions, as a pipeline makes them: ``len``, :meth:`read`, :attr:`captions`."""

    kind = "conditioning"
    manifest_type = ConditioningManifest
    group = "conditioning.zarr"
    captions_schema = CONDITIONING_CAPTIONS_SCHEMA
    length_columns = ("token_ids",)

    @classmethod
    def create(
        cls, path: Path, manifest: ConditioningManifest, captions: pa.Table, samples: pa.Table
    ) -> "ConditioningStore":
        """Write tables, arrays' metadata and, last, the manifest; no shard."""
        prepare_folder(path, cls.kind, cls.group, cls.tables)
        table = captions.cast(CONDITIONING_CAPTIONS_SCHEMA)
        write_whole(path / "captions.parquet", render_table(table))
        write_whole(path / "samples.parquet", render_table(samples.cast(samples_schema(samples))))
        identity = manifest.identity
        with new_group(path / cls.group) as group:
            for tensor in identity.tensors:
                create_array(
                    group,
                    tensor.name,
                    manifest.layout,
                    tuple(tensor.shape),
                    stored_dtype(tensor),
                    _dimensions(tensor, identity.ragged),
                    {"semroute": {"dtype": tensor.dtype}},
                    range(1 + len(tensor.shape)),
                )
        return cls(path, write_manifest(path, manifest))

    @cached_property
    def arrays(self) -> dict[str, ShardedArray]:
        """The stored values by tensor."""
        return {name: self.open_array(name) for name in self.stored_arrays}

    @cached_property
    def stored_arrays(self) -> dict[str, StoredArray]:
        return {
            tensor.name: StoredArray(
                tuple(tensor.shape),
                stored_dtype(tensor).newbyteorder("<"),
                tuple(range(1 + len(tensor.shape))),
            )
            for tensor in self.manifest.identity.tensors
        }

    def expected_rows(self, captions: pa.Table) -> np.ndarray:
        if self.manifest.identity.ragged:
            return numbers(pc.list_value_length(captions["token_ids"]))
        return np.ones(len(captions), np.int64)

    def read(
        self,
        ids: Sequence[int] | np.ndarray,
        names: Sequence[str] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """Tensors of captions by name, in the order of ``ids``.

        Args:
            ids: caption ids; a caption may occur more than once.
            names: of the tensors, default all.
            out: buffers with at least as many rows as are read, used instead of new ones.

        Returns:
            In a ragged store rows of all captions, one caption after the other: ``[rows, *shape]``,
            of which :meth:`num_rows` tells whose they are. Otherwise ``[captions, *shape]``.
            bfloat16 comes as its bits, uint16.

        Raises:
            StoreError: no such caption or tensor.
            InputError: its shard is not written.
        """
        starts, stops = self.row_spans(ids)
        num = int((stops - starts).sum())
        known = {tensor.name: tensor for tensor in self.manifest.identity.tensors}
        found = {}
        slices = self.request(ids, names)
        for name in known if names is None else names:
            shape, dtype = (num, *known[name].shape), stored_dtype(known[name])
            values = np.empty(shape, dtype) if out is None else out[name][:num]
            if values.shape != shape or values.dtype != dtype:
                raise ValueError(
                    f"out[{name!r}] is {values.dtype} {values.shape}; expected {dtype} {shape}"
                )
            self.arrays[name].read_slices(slices, values)
            found[name] = values
        return found

    def request(
        self, ids: Sequence[int] | np.ndarray, names: Sequence[str] | None = None
    ) -> ChunkSlices:
        """Ask the disk for what :meth:`read` will read, ahead of time, and do not wait for it.

        Args, errors: as for :meth:`read`.

        Returns:
            Where the rows of the captions are.
        """
        starts, stops = self.row_spans(ids)
        slices = ChunkSlices.from_runs(starts, stops, self.manifest.layout.rows_per_chunk)
        known = [tensor.name for tensor in self.manifest.identity.tensors]
        for name in known if names is None else names:
            if name not in known:
                raise StoreError(f"{self.path} has no tensor {name!r}; it has {', '.join(known)}")
            self.arrays[name].request(slices)
        return slices

    def tensors(
        self, ids: Sequence[int] | np.ndarray, names: Sequence[str] | None = None
    ) -> "dict[str, torch.Tensor]":
        """As :meth:`read`, as tensors of torch in the pipeline's own dtype."""
        import torch

        dtypes = {tensor.name: tensor.dtype for tensor in self.manifest.identity.tensors}
        return {
            name: torch.from_numpy(values).view(getattr(torch, dtypes[name]))
            for name, values in self.read(ids, names).items()
        }

    def bytes_per_row(self) -> int:
        """Bytes of all tensors of one row of the arrays, uncompressed."""
        return sum(map(row_bytes, self.manifest.identity.tensors))

    def summary(self) -> Summary:
        return summarise_conditioning(self)


def stored_dtype(tensor: ConditioningTensor) -> np.dtype:
    """Dtype of a tensor's array: numpy has no bfloat16, whose bits are stored in uint16."""
    return np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)


def row_bytes(tensor: ConditioningTensor) -> int:
    """Bytes of one row of a tensor's array, uncompressed."""
    return int(np.prod(tensor.shape)) * stored_dtype(tensor).itemsize


def _dimensions(tensor: ConditioningTensor, ragged: bool) -> list[str]:
    """Names of an array's axes."""
    names = ["row"] if ragged else ["caption"]
    if tensor.name == MASK:
        return [*names, "token"]
    inner = ["token", "layer", "channel"][1 if ragged else 0 :]
    num = len(tensor.shape)
    return [*names, *(inner[: num - 1] if num > 1 else []), "channel"]
