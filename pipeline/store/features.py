"""Feature stores: created, written shard by shard, read, finished.

On disk (``docs/store-format.md``)::

    manifest.json      identity, layout, codec; written before any shard
    checksums.json     sha256 of everything that is written once
    captions.parquet   one row per unique caption
    samples.parquet    one row per input row
    hidden.zarr/       a Zarr v3 group of standard arrays
    receipts/          one file per shard, written after it; a shard without one remains to be done
    quarantine/        shards that could not be written, with the reason
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import CAPTIONS_SCHEMA, FeatureManifest, Mixes, Summary, write_whole
from ...schemas.columns import numbers
from ..codecs.base import Codec
from ..codecs.registry import open_codec
from . import views
from .array import ShardedArray, create_array, new_group
from .captions import CaptionStore
from .checks.metadata import StoredArray
from .checks.plain import read_plain
from .documents import StoreError, prepare_folder, render_table, samples_schema, write_manifest
from .reader import (
    Allocator,
    read_codec,
    read_codes,
    read_rows,
    request_rows,
    write_parameters,
)
from .shard_file import ChunkSlices
from .views import summarise_features

if TYPE_CHECKING:
    import torch

NULL_CAPTION = 0
"""Id of the null caption in every feature store."""


@dataclass(frozen=True)
class Caption:
    """One caption of a feature store.

    Attributes:
        caption_id: its number in the store; 0 is the null caption.
        text: without the template.
        tokens: ids of the stored rows, ``[T]``.
        hidden: hidden states, float32 ``[T, L, H]``.
    """

    caption_id: int
    text: str
    tokens: list[int]
    hidden: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Packed hidden states of several captions, without padding.

    Attributes:
        bits: bfloat16 bits, uint16 ``[rows, L, H]``.
        offsets: int64 ``[captions + 1]``; caption i has rows ``offsets[i]:offsets[i + 1]``.
    """

    bits: np.ndarray
    offsets: np.ndarray

    def numpy(self) -> np.ndarray:
        """float32 ``[rows, L, H]``, exactly."""
        return (self.bits.astype(np.uint32) << 16).view(np.float32)

    def tensor(self, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """bfloat16 ``[rows, L, H]``; on the CPU it shares memory with ``bits``."""
        import torch

        return torch.from_numpy(self.bits).view(torch.bfloat16).to(device)


@dataclass(frozen=True)
class Codes:
    """Packed codes of several captions, decompressed but not decoded.

    Attributes:
        arrays: by name, ``[rows, L, size]``; L are the layers of the array up to the highest
            requested. An array that decoding does not need is not there.
        offsets: int64 ``[captions + 1]``; caption i has rows ``offsets[i]:offsets[i + 1]``.
        codec: decodes them.
        layers: positions of the requested layers.
    """

    arrays: dict[str, np.ndarray]
    offsets: np.ndarray
    codec: Codec
    layers: list[int]

    def tensor(self, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """Decoded on a device, to which only the codes are moved: bfloat16 ``[rows, L, H]``."""
        import torch

        tensors = {name: torch.from_numpy(codes) for name, codes in self.arrays.items()}
        moved = {name: codes.to(device, non_blocking=True) for name, codes in tensors.items()}
        return self.codec.decode_torch(moved, self.layers)


class FeatureStore(CaptionStore[FeatureManifest]):
    """Cached hidden states: ``len``, ``store[i]``, :meth:`read`, :attr:`captions`."""

    kind = "feature"
    manifest_type = FeatureManifest
    group = "hidden.zarr"
    captions_schema = CAPTIONS_SCHEMA
    length_columns = ("num_tokens",)
    direct = True
    """Read shard files without zarr-python, and refuse arrays of another form than the documented
    one; set it before the first read. Bytes that zarr-python reads are not checked by semroute."""

    @cached_property
    def num_threads(self) -> int:
        """Number of threads that :meth:`read` decodes with; may be set."""
        return len(os.sched_getaffinity(0))

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: FeatureManifest,
        captions: pa.Table | pa.RecordBatchReader,
        samples: pa.Table,
        parameters: Mapping[str, np.ndarray] | None = None,
    ) -> "FeatureStore":
        """Write tables, arrays' metadata, fitted parameters and, last, the manifest; no shard."""
        prepare_folder(path, cls.kind, cls.group, cls.tables)
        if isinstance(captions, pa.Table):
            captions = captions.cast(CAPTIONS_SCHEMA)
        write_whole(path / "captions.parquet", render_table(captions))
        write_whole(path / "samples.parquet", render_table(samples.cast(samples_schema(samples))))
        _create_arrays(path / cls.group, manifest, parameters or {})
        return cls(path, write_manifest(path, manifest))

    @cached_property
    def arrays(self) -> dict[str, ShardedArray]:
        """The stored codes, one array per array of the codec."""
        direct = None if self.direct else False
        return {name: self.open_array(name, direct=direct) for name in self.stored_arrays}

    @cached_property
    def stored_arrays(self) -> dict[str, StoredArray]:
        identity = self.manifest.identity
        num_layers = len(identity.layers)
        codec = open_codec(self.manifest.codec, identity.layers, identity.model.width, {})
        return {
            spec.name: StoredArray((spec.num_layers(num_layers), spec.size), spec.dtype, spec.order)
            for spec in codec.arrays
        }

    def expected_rows(self, captions: pa.Table) -> np.ndarray:
        return numbers(captions["num_tokens"])

    @cached_property
    def codec(self) -> Codec:
        """The codec of the stored codes, with its fitted parameters.

        Raises:
            StoreError: the parameters are not those that the manifest names.
        """
        return read_codec(self.path, self.group, self.manifest, self.read_files)

    def stored_layers(self) -> list[int]:
        """The coordinate ``layer``, which is for other readers: the manifest has them too."""
        name, shape = f"{self.group}/layer", (len(self.layers),)
        values = read_plain(self.path, name, shape, np.dtype("<i4"), self.read_files)
        return [int(value) for value in values]

    @property
    def layers(self) -> list[int]:
        """Stored layers, ascending; in a store of mixes their numbers, from 1."""
        return self.manifest.identity.layers

    @property
    def mixes(self) -> Mixes | None:
        """The mixes of layers that are stored instead of layers; None if layers are."""
        return self.manifest.identity.mixes

    def __getitem__(self, caption_id: int) -> Caption:
        number = caption_id + len(self) if caption_id < 0 else caption_id
        if not 0 <= number < len(self):
            raise IndexError(f"no caption {caption_id}; the store has 0 to {len(self) - 1}")
        row = self.captions.slice(number, 1).to_pylist()[0]
        return Caption(number, row["text"], row["token_ids"], self.read([number]).numpy())

    def __iter__(self) -> Iterator[Caption]:
        return (self[caption_id] for caption_id in range(len(self)))

    def read(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[int] | None = None,
        out: np.ndarray | None = None,
    ) -> Rows:
        """Hidden states of captions, packed in the order of ``ids``.

        Args:
            ids: caption ids; a caption may occur more than once.
            layers: LLM layers, default all that are stored.
            out: uint16 buffer of at least ``[rows, layers, H]``, used instead of a new one.

        Raises:
            InputError: no such caption or layer, or its shard is not written.
        """
        starts, stops = self.row_spans(ids)
        offsets = _offsets(stops - starts)
        positions = self.layer_positions(layers)
        shape = (int(offsets[-1]), len(positions), self.manifest.identity.model.width)
        rows = np.empty(shape, np.uint16) if out is None else _part_of(out, shape)
        slices = ChunkSlices.from_runs(starts, stops, self.manifest.layout.rows_per_chunk)
        read_rows(self.arrays, self.codec, slices, positions, rows, self.num_threads)
        return Rows(rows, offsets)

    def read_padded(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[int] | None = None,
        out: np.ndarray | None = None,
        places: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Hidden states of captions, each padded with zeros to the length of the longest.

        Args:
            ids, layers: as for :meth:`read`.
            out: C-contiguous uint16 buffer ``[captions, rows, layers, H]`` with enough rows for the
                longest, used instead of a new one.
            places: index of each caption in ``out``, by default its index in ``ids``; the rest of
                ``out`` is left alone.

        Returns:
            bfloat16 bits, uint16 ``[captions, rows, layers, H]``.

        Raises:
            InputError: as :meth:`read`.
        """
        starts, stops = self.row_spans(ids)
        positions = self.layer_positions(layers)
        counts, width = stops - starts, self.manifest.identity.model.width
        shape = (len(counts), int(counts.max(initial=0)), len(positions), width)
        out = np.empty(shape, np.uint16) if out is None else _check_padded(out, shape)
        index = np.arange(len(counts)) if places is None else np.asarray(places, np.int64)
        if len(index) != len(counts) or (index >= len(out)).any() or (index < 0).any():
            raise ValueError(f"places {index} of {len(counts)} captions in {len(out)}")
        rows_per_chunk, targets = self.manifest.layout.rows_per_chunk, index * out.shape[1]
        slices = ChunkSlices.from_runs(starts, stops, rows_per_chunk, targets)
        rows = out.reshape(-1, *shape[2:])
        read_rows(self.arrays, self.codec, slices, positions, rows, self.num_threads)
        for place, count in zip(index.tolist(), counts.tolist(), strict=True):
            out[place, count:] = 0
        return out

    def read_codes(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[int] | None = None,
        *,
        empty: Allocator = np.empty,
    ) -> Codes:
        """The codes of what :meth:`read` reads, for a device that decodes faster.

        Args:
            empty: allocates the memory that codes are read into.

        Other args, errors: as for :meth:`read`.
        """
        starts, stops = self.row_spans(ids)
        offsets = _offsets(stops - starts)
        positions = self.layer_positions(layers)
        slices = ChunkSlices.from_runs(starts, stops, self.manifest.layout.rows_per_chunk)
        depths = self.codec.depths(positions)
        request_rows(self.arrays, self.codec, slices, positions)
        codes = read_codes(self.arrays, slices, int(offsets[-1]), depths, empty)
        return Codes(codes, offsets, self.codec, positions)

    def request(self, ids: Sequence[int] | np.ndarray, layers: Sequence[int] | None = None) -> None:
        """Ask the disk for what :meth:`read` will read, ahead of time, and do not wait for it.

        Args, errors: as for :meth:`read`.
        """
        starts, stops = self.row_spans(ids)
        slices = ChunkSlices.from_runs(starts, stops, self.manifest.layout.rows_per_chunk)
        request_rows(self.arrays, self.codec, slices, self.layer_positions(layers))

    def layer_positions(self, layers: Sequence[int] | None = None) -> list[int]:
        """Positions of layers, default all, along the layer axis of the arrays.

        Raises:
            InputError: no layer, or one that is not stored.
        """
        places = {layer: place for place, layer in enumerate(self.layers)}
        layers = self.layers if layers is None else layers
        if not len(layers):
            raise StoreError("no layer asked for")
        for layer in layers:
            if layer not in places:
                raise StoreError(f"layer {layer} is not stored; {self.path} has {self.layers}")
        return [places[layer] for layer in layers]

    def search(self, text: str) -> pa.Table:
        """Captions that contain every word of ``text``, in any order and case.

        Returns:
            The rows of :attr:`captions`; their ``caption_id`` are ids for :meth:`read`.
        """
        found = self.captions
        for word in text.split():
            found = found.filter(pc.match_substring(found["text"], word, ignore_case=True))
        return found

    to_dask = views.to_dask
    to_xarray = views.to_xarray

    def padded_bytes(self) -> int:
        """Bytes of the same features in bf16, every caption padded to the longest."""
        longest = int(self.num_rows(range(len(self))).max())
        return len(self) * longest * self.bytes_per_row()

    def bytes_per_row(self) -> int:
        """Bytes of one token in bf16, uncompressed, all stored layers."""
        return 2 * len(self.layers) * self.manifest.identity.model.width

    def summary(self) -> Summary:
        return summarise_features(self)


def _create_arrays(
    path: Path, manifest: FeatureManifest, parameters: Mapping[str, np.ndarray]
) -> None:
    """Write the metadata of the codec's arrays, its parameters, and the numbers of the layers."""
    layers, width = manifest.identity.layers, manifest.identity.model.width
    codec = open_codec(manifest.codec, layers, width, parameters)
    with new_group(path) as group:
        for spec in codec.arrays:
            values = "channel" if spec.size == width else f"{spec.name}_value"
            attributes: dict[str, Any] = {"codec": manifest.codec.name, "meaning": spec.meaning}
            axis = "layer"
            if spec.layers is not None:
                attributes["layers"] = [layers[position] for position in spec.layers]
                axis = f"{spec.name}_layer"
            create_array(
                group,
                spec.name,
                manifest.layout,
                (spec.num_layers(len(layers)), spec.size),
                spec.dtype,
                ("row", axis, values),
                {"semroute": attributes},
                spec.order,
            )
        write_parameters(group, codec.parameters)
        array = group.create_array(
            "layer", shape=(len(layers),), dtype="int32", dimension_names=["layer"]
        )
        array[:] = np.array(layers, np.int32)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """Where captions of so many rows begin when packed, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _part_of(out: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The first rows of a buffer, ``[rows, layers, H]``."""
    if out.dtype != np.uint16 or out.shape[1:] != shape[1:]:
        raise ValueError(
            f"out is {out.dtype} {out.shape}; expected uint16 [rows, {shape[1]}, {shape[2]}]"
        )
    if len(out) < shape[0]:
        raise ValueError(f"out has {len(out)} rows; {shape[0]} are needed")
    return out[: shape[0]]


def _check_padded(out: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """A buffer, if it is ``[captions, rows, layers, H]`` with enough rows."""
    _, longest, num_layers, width = shape
    if out.dtype != np.uint16 or out.ndim != 4 or out.shape[2:] != (num_layers, width):
        raise ValueError(
            f"out is {out.dtype} {out.shape}; expected uint16 [captions, rows, {num_layers}, "
            f"{width}]"
        )
    if not out.flags.c_contiguous or out.shape[1] < longest:
        raise ValueError(
            f"out has {out.shape[1]} rows per caption; {longest} are needed, without gaps"
        )
    return out
