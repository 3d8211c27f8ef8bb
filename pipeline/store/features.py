"""Feature stores: create, write one shard, read, finish; and the doors to both kinds of store.

On disk (``docs/store-format.md``)::

    manifest.json      identity, layout, codec; written before any shard
    captions.parquet   features only: a row a unique caption
    samples.parquet    a row an input row
    hidden.zarr/       (latents.zarr/) a Zarr v3 group of standard arrays
    receipts/          a file a shard, written after it; what has none remains to be done
    quarantine/        shards that could not be written, with the reason
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import CAPTIONS_SCHEMA, SAMPLES_SCHEMA, FeatureManifest, Mixes, Summary, write_whole
from ...schemas.units import format_bytes
from ..codecs.base import Codec, digest_parameters
from ..codecs.registry import CODECS, open_codec
from .array import ShardedArray, allocate, new_group
from .base import Store
from .documents import StoreError, render_table, write_manifest
from .parameters import read_parameters, write_parameters
from .shard_file import ChunkSlices

if TYPE_CHECKING:
    import torch


FEATURES_FORMAT = "semroute.features"
BLOCK_BYTES = 4_000_000
"""Decoded bytes that are read and decoded at a time by one thread."""
DASK_BYTES = 64_000_000
"""Of a block of a lazy array, in float32."""
Empty = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Gives memory of a shape and dtype, with any numbers in it."""


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
    """Packed codes of several captions: what is on disk, decompressed, to be decoded anywhere.

    Attributes:
        arrays: by name, ``[rows, L, size]``; L are the stored layers up to the last one wanted.
        offsets: int64 ``[captions + 1]``; caption i has rows ``offsets[i]:offsets[i + 1]``.
        codec: that decodes them.
        layers: positions of the layers wanted.
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


class FeatureStore(Store[FeatureManifest]):
    """Cached hidden states: ``len``, ``store[i]``, :meth:`read`, :attr:`captions`."""

    kind = "feature"
    manifest_type = FeatureManifest
    group = "hidden.zarr"
    direct = True
    """Read shard files of the known form without zarr-python; set it before the first read."""

    @cached_property
    def num_threads(self) -> int:
        """Threads that :meth:`read` decodes with; may be set."""
        return len(os.sched_getaffinity(0))

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: FeatureManifest,
        captions: pa.Table,
        samples: pa.Table,
        parameters: Mapping[str, np.ndarray] | None = None,
    ) -> "FeatureStore":
        """Write tables, array metadata and, last, the manifest; no shard.

        Args:
            parameters: of the codec, where it has been fitted.
        """
        cls.prepare(path, ("captions.parquet", "samples.parquet"))
        write_whole(path / "captions.parquet", render_table(captions.cast(CAPTIONS_SCHEMA)))
        write_whole(path / "samples.parquet", render_table(samples.cast(SAMPLES_SCHEMA)))
        identity = manifest.identity
        num_layers, width = len(identity.layers), identity.model.width
        codec = open_codec(manifest.codec, num_layers, width, parameters or {})
        with new_group(path / cls.group) as group:
            for spec in codec.arrays:
                values = "channel" if spec.size == width else f"{spec.name}_value"
                allocate(
                    group,
                    spec.name,
                    manifest.layout,
                    (num_layers, spec.size),
                    spec.dtype,
                    ("row", "layer", values),
                    {"semroute": {"codec": codec.name, "meaning": spec.meaning}},
                    spec.order,
                )
            write_parameters(group, codec.parameters)
            layers = group.create_array(
                "layer", shape=(len(identity.layers),), dtype="int32", dimension_names=["layer"]
            )
            layers[:] = np.array(identity.layers, np.int32)
        write_manifest(path, manifest)
        return cls(path, manifest)

    @cached_property
    def arrays(self) -> dict[str, ShardedArray]:
        """The stored codes, one array per array of the codec."""
        root, layout = self.path / self.group, self.manifest.layout
        direct = None if self.direct else False
        for spec in self.codec.arrays:
            self.check_files(f"{self.group}/{spec.name}/zarr.json")
        return {
            spec.name: ShardedArray(root / spec.name, layout, direct=direct)
            for spec in self.codec.arrays
        }

    @cached_property
    def codec(self) -> Codec:
        """What the codes mean.

        Raises:
            StoreError: its fitted parameters are not those that the manifest names.
        """
        spec, identity = self.manifest.codec, self.manifest.identity
        parameters: dict[str, np.ndarray] = {}
        if spec.fit is not None:
            self.check_files(f"{self.group}/parameters/")
            parameters = read_parameters(self.path / self.group, CODECS[spec.name].fits)
            if digest_parameters(parameters) != spec.fit.sha256:
                raise StoreError(
                    f"{self.path / self.group / 'parameters'} does not hold what the codec was "
                    "fitted to (its sha256 is not the manifest's); put it back from a copy"
                )
        return open_codec(spec, len(identity.layers), identity.model.width, parameters)

    @cached_property
    def captions(self) -> pa.Table:
        """A row a unique caption, in store order (:data:`semroute.schemas.CAPTIONS_SCHEMA`)."""
        return self.read_table("captions.parquet")

    @cached_property
    def samples(self) -> pa.Table:
        """A row an input row (:data:`semroute.schemas.SAMPLES_SCHEMA`)."""
        return self.read_table("samples.parquet")

    @cached_property
    def first_captions(self) -> np.ndarray:
        """First caption of each sample: ids for :meth:`read`, int64 ``[samples]``."""
        return np.asarray(pc.list_element(self.samples["caption_ids"], 0).to_numpy())

    def check_source(
        self,
        source: str | os.PathLike[str],
        texts: Sequence[str],
        *,
        first_rows: bool = False,
        remedy: str = "",
    ) -> None:
        """Refuse a file that this store was not extracted from.

        Args:
            source: the file, for the message.
            texts: first caption of each row of the file.
            first_rows: ``texts`` may be those of the file's first rows only.
            remedy: what to do, a sentence at the end of the message.

        Raises:
            StoreError: the first captions of the stored samples are not these.
        """
        ids = self.first_captions[: len(texts)] if first_rows else self.first_captions
        if self.captions["text"].take(pa.array(ids)).to_pylist() != list(texts):
            raise StoreError(
                f"{self.path} was not extracted from {source}: the captions differ."
                f"{' ' * bool(remedy)}{remedy}"
            )

    @property
    def layers(self) -> list[int]:
        """Stored layers, ascending; of a store of mixes their numbers, from 1."""
        return self.manifest.identity.layers

    @property
    def mixes(self) -> Mixes | None:
        """What the positions are where they are mixes of layers; None where they are layers."""
        return self.manifest.identity.mixes

    def __len__(self) -> int:
        return self.manifest.identity.captions.num_captions

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
        starts, stops, offsets = self._runs(ids)
        positions = self._positions(layers)
        shape = (len(positions), self.manifest.identity.model.width)
        if out is None:
            out = np.empty((offsets[-1], *shape), np.uint16)
        elif out.dtype != np.uint16 or out.shape[1:] != shape:
            raise ValueError(
                f"out is {out.dtype} {out.shape}; expected uint16 [rows, {shape[0]}, {shape[1]}]"
            )
        elif len(out) < offsets[-1]:
            raise ValueError(f"out has {len(out)} rows; {offsets[-1]} are needed")
        rows = out[: offsets[-1]]
        self._read(
            ChunkSlices.of(starts, stops, self.manifest.layout.rows_per_chunk), positions, rows
        )
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
            out: uint16 buffer ``[captions, rows, layers, H]``, C-contiguous, of enough rows for the
                longest, used instead of a new one.
            places: of each caption in ``out``, default its place in ``ids``; others are left alone.

        Returns:
            bfloat16 bits, uint16 ``[captions, rows, layers, H]``.

        Raises:
            InputError: as :meth:`read`.
        """
        starts, stops, _ = self._runs(ids)
        positions = self._positions(layers)
        counts = stops - starts
        longest, shape = counts.max(initial=0), (len(positions), self.manifest.identity.model.width)
        if out is None:
            out = np.empty((len(counts), longest, *shape), np.uint16)
        elif out.dtype != np.uint16 or out.ndim != 4 or out.shape[2:] != shape:
            raise ValueError(
                f"out is {out.dtype} {out.shape}; expected uint16 [captions, rows, {shape[0]}, "
                f"{shape[1]}]"
            )
        elif not out.flags.c_contiguous or out.shape[1] < longest:
            raise ValueError(
                f"out has {out.shape[1]} rows a caption; {longest} are needed, without gaps"
            )
        held = np.arange(len(counts)) if places is None else np.asarray(places, np.int64)
        if len(held) != len(counts) or (held >= len(out)).any() or (held < 0).any():
            raise ValueError(f"places {held} of {len(counts)} captions in {len(out)}")
        pieces = ChunkSlices.of(
            starts, stops, self.manifest.layout.rows_per_chunk, held * out.shape[1]
        )
        self._read(pieces, positions, out.reshape(-1, *shape))
        for place, count in zip(held.tolist(), counts.tolist(), strict=True):
            out[place, count:] = 0
        return out

    def num_rows(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of captions, int64 ``[captions]``.

        Raises:
            InputError: no such caption.
        """
        starts, stops, _ = self._runs(ids)
        return np.asarray(stops - starts)

    def _read(self, pieces: ChunkSlices, positions: list[int], rows: np.ndarray) -> None:
        """Decode pieces to their targets in ``rows``, uint16 ``[rows, len(positions), H]``."""
        if self.codec.name == "bf16":
            everything = positions == list(range(len(self.layers)))
            self.arrays["hidden"].read_pieces(
                pieces, rows, slice(None) if everything else positions
            )
            return

        def decode(block: ChunkSlices) -> None:
            codes = self._codes(block.packed(), int(block.num.sum()), max(positions) + 1)
            self.codec.decode(codes, positions, block.rows(), rows)

        chunk_bytes = self.manifest.layout.rows_per_chunk * self.bytes_per_row()
        blocks = [*pieces.blocks(max(1, BLOCK_BYTES // chunk_bytes))]
        if self.num_threads > 1 and len(blocks) > 1:
            with ThreadPoolExecutor(min(self.num_threads, len(blocks))) as pool:
                for _ in pool.map(decode, blocks):
                    pass
        else:
            for block in blocks:
                decode(block)

    def read_codes(
        self,
        ids: Sequence[int] | np.ndarray,
        layers: Sequence[int] | None = None,
        *,
        empty: Empty = np.empty,
    ) -> Codes:
        """What :meth:`read` reads, not yet decoded, for a device that decodes faster.

        Args:
            empty: gives the memory that codes are read into.

        Other args, errors: as for :meth:`read`.
        """
        starts, stops, offsets = self._runs(ids)
        positions = self._positions(layers)
        pieces = ChunkSlices.of(starts, stops, self.manifest.layout.rows_per_chunk)
        codes = self._codes(pieces, int(offsets[-1]), max(positions) + 1, empty)
        return Codes(codes, offsets, self.codec, positions)

    def _codes(
        self,
        pieces: ChunkSlices,
        num_rows: int,
        num_layers: int,
        empty: Empty = np.empty,
    ) -> dict[str, np.ndarray]:
        """Codes of the lowest stored layers, ``[num_rows, num_layers, size]`` each."""
        codes = {}
        for name, array in self.arrays.items():
            size = array.row_shape[1]
            codes[name] = empty((num_rows, num_layers, size), array.dtype)
            array.read_pieces(pieces, codes[name], slice(num_layers))
        return codes

    def _runs(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of captions, from and to, and where they go when they are packed."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise StoreError(
                f"caption ids {ids.min()} to {ids.max()} asked for; the store has 0 to "
                f"{len(self) - 1}"
            )
        starts, stops = self._row_starts[ids], self._row_stops[ids]
        return starts, stops, np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)

    def _positions(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(len(self.layers)))
        if not len(layers):
            raise StoreError("no layer asked for")
        return [self._layer_position(layer) for layer in layers]

    def _layer_position(self, layer: int) -> int:
        if layer not in self.layers:
            raise StoreError(f"layer {layer} is not stored; {self.path} has {self.layers}")
        return self.layers.index(layer)

    @cached_property
    def _row_starts(self) -> np.ndarray:
        return self.captions["row_start"].to_numpy()

    @cached_property
    def _row_stops(self) -> np.ndarray:
        return self.captions["row_stop"].to_numpy()

    def search(self, text: str) -> pa.Table:
        """Captions that hold every word of ``text``, in whatever case and order.

        Returns:
            The rows of :attr:`captions`; their ``caption_id`` are ids for :meth:`read`.
        """
        found = self.captions
        for word in text.split():
            found = found.filter(pc.match_substring(found["text"], word, ignore_case=True))
        return found

    def to_dask(self, layers: Sequence[int] | None = None) -> Any:
        """All rows as a lazy dask array, float32 ``[rows, layers, H]``.

        Rows are those of the captions in store order, without what lies between them; a block is
        the captions of ``DASK_BYTES``, and is read and decoded when it is computed.

        Args:
            layers: LLM layers, default all that are stored.
        """
        import dask.array

        shape = (len(self._positions(layers)), self.manifest.identity.model.width)
        stops = np.cumsum(self._row_stops - self._row_starts)
        rows = max(1, DASK_BYTES // (4 * shape[0] * shape[1]))
        cuts = np.unique(np.searchsorted(stops, np.arange(0, stops[-1] + rows, rows), "right"))
        cuts = np.unique(np.concatenate([[0], cuts, [len(self)]]))
        counts = np.diff(np.concatenate([[0], stops])[cuts])

        def read(block: np.ndarray, store: FeatureStore) -> np.ndarray:
            return store.read(np.arange(*block[0, 0, 0]), layers).numpy()

        ranges = np.stack([cuts[:-1], cuts[1:]], 1)[:, None, None]  # [blocks, 1, 1, 2]
        blocks = dask.array.from_array(ranges, chunks=(1, 1, 1, 2))
        return dask.array.map_blocks(
            read,
            blocks,
            self,
            dtype=np.float32,
            chunks=(tuple(map(int, counts)), *((size,) for size in shape)),
            drop_axis=3,
            meta=np.empty((0, 0, 0), np.float32),
        )

    def to_xarray(self, layers: Sequence[int] | None = None) -> Any:
        """All rows as a lazy xarray Dataset: ``hidden`` of :meth:`to_dask` with named dimensions.

        Coordinates: ``layer`` (of the LLM), and of each ``row`` its ``caption`` (id), ``token``
        (id) and ``position`` in the caption.

        Args:
            layers: LLM layers, default all that are stored.

        Raises:
            ImportError: xarray is not installed.
        """
        import xarray

        counts = self._row_stops - self._row_starts
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        identity = self.manifest.identity
        return xarray.Dataset(
            {"hidden": (("row", "layer", "channel"), self.to_dask(layers))},
            coords={
                "layer": list(self.layers if layers is None else layers),
                "caption": ("row", np.repeat(np.arange(len(self)), counts)),
                "token": ("row", self.captions["token_ids"].combine_chunks().flatten().to_numpy()),
                "position": ("row", np.arange(len(starts)) - starts),
            },
            attrs={
                "model": _last_part(self.manifest.provenance.model),
                "template": identity.template.text,
                "codec": self.manifest.codec.name,
            },
        )

    def padded_bytes(self) -> int:
        """Bytes of the same features in bf16, every caption padded to the longest."""
        longest = int((self._row_stops - self._row_starts).max())
        return len(self) * longest * self.bytes_per_row()

    def bytes_per_row(self) -> int:
        """Uncompressed bf16 bytes of one token, all stored layers."""
        return 2 * len(self.layers) * self.manifest.identity.model.width

    def facts(self) -> Summary:
        identity, layout, codec = (
            self.manifest.identity,
            self.manifest.layout,
            self.manifest.codec,
        )
        num_bytes = self.num_bytes()
        cut = int(np.count_nonzero(self.captions["num_cut_tokens"].to_numpy()))
        model = _last_part(self.manifest.provenance.model)
        mixes = {}
        if self.mixes is not None:
            mixes["mixes"] = (
                f"{self.mixes.num_mixes} of these layers, for the blocks of a run with strategy "
                f"{self.mixes.strategy} (step {self.mixes.step:,}, {self.mixes.source}); error of "
                f"what blocks read {self.mixes.error:.1e}"
            )
        items = {
            "model": f"{model} ({identity.model.architecture}, {identity.model.num_layers} layers "
            f"of {identity.model.width}, {identity.dtype})",
            "template": f"{identity.template.text!r}, prefix "
            f"{'kept' if identity.template.keep_prefix else 'dropped'} (tokens: "
            f"{len(identity.template.prefix_tokens)})",
            "layers": _ranges(identity.llm_layers)
            + (", the last after the final norm" if identity.final_norm == "normed" else ""),
            **mixes,
            "captions": f"{len(self):,} unique (the null caption included) of "
            f"{identity.samples.num_samples:,} samples",
            "tokens": f"{layout.num_rows:,}; {cut:,} captions cut at {identity.max_length} tokens",
            "codec": codec.name
            if codec.quality is None
            else f"{codec.name}, quality {codec.quality:g}",
            "bytes": format_bytes(num_bytes),
            "state": self._state(),
        }
        if self.is_complete:
            items["bytes"] += f", {self.padded_bytes() / num_bytes:.2f}x less than padded bf16"
        return Summary(f"FeatureStore {self.path}", items)


def _last_part(model: str) -> str:
    """A hub id as it is; of a path the file or folder, as the manifest has the rest."""
    return Path(model).name if Path(model).is_absolute() else model


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` -> ``"1-3, 7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


NULL_CAPTION = 0
"""Entry of every feature store that holds the null caption."""
