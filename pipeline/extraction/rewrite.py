"""Feature store -> feature store: another codec, fewer layers, their mixes, fewer captions.

No LLM is run. Shapes: R rows (tokens), L layers, K mixes of them, D blocks, H width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import (
    CAPTIONS_SCHEMA,
    SAMPLES_SCHEMA,
    CaptionsIdentity,
    Codec,
    Derived,
    FeatureIdentity,
    FeatureManifest,
    InputError,
    Mixes,
    Rank,
    Receipt,
    Routing,
    SamplesIdentity,
    differences,
    final_norm_of,
    fingerprint,
    parse,
)
from ...schemas.columns import numbers
from ...schemas.files import locate
from ...schemas.seeds import UnnumberedPurpose, numpy_generator
from ...schemas.units import format_bytes
from ..codecs.base import Coded, allocate, insert
from ..codecs.error import CodecError, codec_error
from ..codecs.fit import fit_codec, fit_rows, fitted_spec
from ..codecs.mixes import SAMPLE_ROWS, combine, find_mixes, mix
from ..codecs.registry import (
    CODECS,
    fitted_before,
    is_lossy,
    request_codec,
    settle_rank,
    with_exact_layers,
)
from ..executor.base import Deferred, Executor, report_progress, worker_name
from ..executor.progress import Style
from ..executor.workers import Workers
from ..sources.table import read_samples
from ..store.features import FeatureStore
from ..store.layout import Packing, pack, rows_of
from ..store.open import open_features
from .driver import FeatureStorePlan, provenance, write_store
from .exact import choose_exact_layers
from .plan import with_extra
from .requests import RewriteRequest

if TYPE_CHECKING:
    import torch


BATCH_BYTES = 64_000_000
"""Decoded bytes of the source that a worker holds at a time."""


@dataclass(frozen=True)
class _Job:
    """The part of a task that is the same for every shard of a rewriting."""

    source: Path
    target: Path


@dataclass(frozen=True)
class _Selection:
    """Captions and samples of the new store; ids are numbered anew.

    Attributes:
        ids: captions of the source, ascending, the null caption first, int64 ``[captions]``.
        samples: as in samples.parquet, with the new ids.
    """

    ids: np.ndarray
    samples: pa.Table
    identity: SamplesIdentity


def rewrite(
    features: str | Path,
    out: str | Path,
    *,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
    **options: Any,
) -> FeatureStore:
    """Write a complete feature store once more: another codec, fewer layers, mixes, fewer captions.

    Called again with the same arguments it resumes where it was stopped. Receipts have what is lost
    here; what the source had lost is in the manifest (``derived``); at most the two add up.

    Args:
        features, out, options: the fields of
            :class:`semroute.pipeline.extraction.requests.RewriteRequest`; ``out`` is its target.
        report, progress: as in :func:`semroute.pipeline.extraction.extract`.

    Raises:
        InputError: bad input, before any work; or a store that was made differently.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    request = parse(
        RewriteRequest, {"features": features, "target": locate(out), **options}, "the rewriting"
    )
    source = open_features(request.features)
    if str(request.target.resolve()) == str(source.path.resolve()):
        raise InputError(f"{out} is the store itself; name a new folder")
    layers = _choose_layers(request.layers, source)
    _check_routing(request.routing, request.rank, request.layers, source)
    if request.shuffle_layers is not None:
        name = request.codec or source.manifest.codec.name
        _check_shuffle(name, request.routing, source)
    selection = _select(source, request.captions, request.text_options)

    def plan(existing: FeatureStore | None, _workers: Workers) -> RewritePlan:
        return plan_rewrite(request, source, layers, selection, existing, report)

    return write_store(FeatureStore, plan, request, report, progress, gpus=0)


@dataclass(frozen=True, kw_only=True)
class RewritePlan(FeatureStorePlan):
    """A feature store to be made from another one.

    Attributes:
        source: the store that is read.
        selection: captions and samples of the new store.
        captions: their rows of captions.parquet, as in the source.
    """

    source: FeatureStore
    selection: _Selection
    captions: pa.Table

    def settle(self, executor: Executor, report: Callable[[str], None]) -> "RewritePlan":
        """Fit the codec to the first captions; here, as no LLM is run."""
        name, width = self.manifest.codec.name, self.manifest.identity.model.width
        if self.existing is not None or not CODECS[name].fits:
            return self
        first = _First(self.source, self.selection.ids, self._num_tokens)
        num = first.num_captions(fit_rows(width))
        report(f"fitting {name} to {num:,} captions, {self._num_tokens[:num].sum():,} tokens")
        sample = first.read(fit_rows(width), *_reading(self.source, self.manifest.identity))
        fitted, bits = fit_codec(self.manifest.codec, sample, self.manifest.identity.layers)
        spec = fitted_spec(self.manifest.codec, fitted, num, len(sample))
        manifest = self.manifest.model_copy(update={"codec": spec})
        return replace(
            self, manifest=manifest, parameters=dict(fitted.parameters), bits_per_value=bits
        )

    def tables(self) -> dict[str, pa.Table]:
        return {
            "samples": self.selection.samples,
            "captions": _captions_table(self.captions, self.packing),
        }

    def describe(self) -> str:
        layers, mixes = self.manifest.identity.layers, self.manifest.identity.mixes
        kept = f"{len(layers)} of {len(self.source.layers)} layers"
        if mixes is not None:
            kept = f"{len(layers)} mixes of {len(mixes.layers)} layers"
        return (
            f"{len(self.selection.ids):,} of {len(self.source):,} captions, "
            f"{self.packing.layout.num_rows:,} tokens x {kept}: "
            f"{format_bytes(self.uncompressed_bytes())} before {self.manifest.codec.name}"
        )

    def task(self, shard: int) -> tuple[_Job, int, np.ndarray]:
        entries = self.packing.entries(shard)
        job = _Job(self.source.path.resolve(), self.path.resolve())
        return job, shard, self.selection.ids[entries.start : entries.stop]

    @staticmethod
    def function(*task: Any) -> Deferred[Receipt]:
        return _rewrite_shard(*task)

    @property
    def _num_tokens(self) -> np.ndarray:
        return numbers(self.captions["num_tokens"])


def plan_rewrite(
    request: RewriteRequest,
    source: FeatureStore,
    layers: list[int],
    selection: _Selection,
    existing: FeatureStore | None,
    report: Callable[[str], None],
) -> RewritePlan:
    """Plan a rewriting; for mixes a sample of the source is read.

    Args:
        layers: those of the source that are kept, unless they are mixed.
    """
    before = source.manifest
    spec = _request_codec(request, before)
    codec = spec.name
    table = source.captions.take(pa.array(selection.ids))
    num_tokens = numbers(table["num_tokens"])
    mixes = before.identity.mixes
    if request.routing is not None:
        mixes = None if existing is None else existing.manifest.identity.mixes
        if not _asked_for(mixes, request.routing, request.num_mixes):
            first = _First(source, selection.ids, num_tokens)
            sample = first.read(SAMPLE_ROWS, request.routing.layers, None)
            mixes = find_mixes(request.routing, sample, request.num_mixes)
        assert mixes is not None
        report(_describe_mixes(mixes))
        layers = [*range(1, mixes.num_mixes + 1)]
    packing = pack(
        num_tokens,
        bytes_per_row=2 * len(layers) * before.identity.model.width,
        shard_bytes=request.shard_bytes,
        batch_tokens=before.layout.batch_tokens,
        rows_per_chunk=None if existing is None else existing.manifest.layout.rows_per_chunk,
        aligned=CODECS[codec].aligned,
    )
    shuffled = before.identity.shuffled
    changes = {
        "layers": layers,
        "mixes": mixes,
        "shuffled": shuffled if request.shuffle_layers is None else request.shuffle_layers,
        "final_norm": final_norm_of(
            layers if mixes is None else mixes.layers, before.identity.model.num_layers
        ),
        "captions": CaptionsIdentity(
            num_captions=len(selection.ids),
            fingerprint=fingerprint(table["text"]),
            seed=before.identity.captions.seed,
        ),
        "samples": selection.identity,
    }
    identity = before.identity.model_copy(update=changes)
    spec = with_exact_layers(spec, _choose_exact(request.exact_layers, codec, identity, source))
    error = codec_error(list(source.receipts().values()))
    manifest = FeatureManifest(
        status="extracting",
        identity=identity,
        layout=packing.layout,
        codec=fitted_before(spec, None if existing is None else existing.manifest.codec),
        derived=Derived(codec=before.codec, codec_error=error.get("mean")),
        provenance=provenance(str(request.features), before.provenance.model),
    )
    return RewritePlan(
        path=request.target,
        existing=existing,
        manifest=manifest,
        packing=packing,
        source=source,
        selection=selection,
        captions=table,
    )


def _request_codec(request: RewriteRequest, before: FeatureManifest) -> Codec:
    """The codec that is asked for; by default that of the source."""
    name, quality, rank = request.codec, request.quality, request.codec_rank
    if name is None:
        name = "predictive" if rank is not None else before.codec.name
        quality = before.codec.quality if quality is None else quality
        rank = before.codec.rank if rank is None else rank
    return settle_rank(request_codec(name, quality, rank), before.identity.model.width)


def _choose_exact(
    asked: str | None, codec: str, identity: FeatureIdentity, source: FeatureStore
) -> list[int]:
    """Layers of the new store that are also stored exactly: of a source with loss only those that
    it has exactly."""
    held = source.manifest.codec
    if not is_lossy(held.name):
        return choose_exact_layers(asked, codec, identity)
    if asked is None:
        return [
            layer for layer in held.exact_layers if is_lossy(codec) and layer in identity.layers
        ]
    chosen = choose_exact_layers(asked, codec, identity)
    if lossy := sorted({*chosen} - {*held.exact_layers}):
        raise InputError(
            f"--exact-layers {asked}: {source.path} does not hold {lossy} exactly, but "
            f"{[*held.exact_layers] or 'no layer'}. Name a store with codec bf16 or lossless, or "
            "extract the captions anew."
        )
    return chosen


def _rewrite_shard(job: _Job, shard: int, ids: np.ndarray) -> Deferred[Receipt]:
    """Read and encode one shard, then write it and its receipt. Runs in a worker.

    Args:
        ids: captions of the source that go into this shard, in order.
    """
    import torch

    started = time.perf_counter()
    source, store = open_features(job.source), FeatureStore.open(job.target, complete=False)
    layout, layers, mixes = store.manifest.layout, store.layers, store.mixes
    torch.set_num_threads(layout.num_threads)
    source.num_threads = 1
    mine = store.captions.filter(pc.equal(store.captions["shard"], shard))
    row_start = numbers(mine["row_start"]) - shard * layout.rows_per_shard
    counts = numbers(mine["num_tokens"])
    codec = store.codec
    error = CodecError(layers if mixes is None else range(len(mixes.weights)))
    used = rows_of(row_start, counts)
    arrays = allocate(codec.arrays, layout.rows_per_shard, len(layers), used)
    read, basis = _reading(source, store.manifest.identity)
    for part in _parts(counts, max(1, BATCH_BYTES // source.bytes_per_row())):
        given = source.read(ids[part], read).tensor()  # [R, L or K, H]
        seed = store.manifest.identity.shuffled
        if seed is not None and source.manifest.identity.shuffled is None:
            given = _shuffle(given, ids[part], counts[part], seed)
        hidden = given if basis is None else mix(given, basis)  # [R, L or K, H]
        rows = rows_of(row_start[part], counts[part])
        decoded = []
        coded: Coded | None = None
        for index in range(len(layers)):
            one = hidden[:, index]
            coded = codec.encode(index, one, coded)
            if mixes is None:
                error.add(index, one, coded.hidden)
            else:
                decoded.append(coded.hidden)
            insert(arrays, codec.arrays, index, rows, coded.codes)
        if mixes is not None:
            before = source.mixes
            if before is None:
                wanted = mix(given, mixes.weights)  # [R, D, H]
            else:
                wanted = combine(given, before.coefficients)  # [R, D, H]
            found = combine(torch.stack(decoded, 1), mixes.coefficients)  # [R, D, H]
            for block in range(found.shape[1]):
                error.add_normed(block, wanted[:, block], found[:, block])
        report_progress(shard, part.stop)
    receipt = Receipt(
        shard=shard,
        num_rows=int(counts.sum()),
        num_entries=len(ids),
        files={},
        codec_error=error.to_dict(),
        layer_error=error.by_layer(),
        warnings=[],
        seconds={"encode": time.perf_counter() - started},
        worker=worker_name(),
    )
    return Deferred(partial(store.complete_shard, arrays, receipt))


def _shuffle(
    hidden: "torch.Tensor", ids: np.ndarray, counts: np.ndarray, seed: int
) -> "torch.Tensor":
    """Rows [R, L, H] of captions with their layers in random order, a function of (seed, caption)
    that all rows of a caption share."""
    import torch

    purpose = UnnumberedPurpose.LAYER_ORDER
    orders = [
        numpy_generator(seed, purpose, caption).permutation(hidden.shape[1])
        for caption in ids.tolist()
    ]
    order = torch.from_numpy(np.repeat(np.stack(orders), counts, axis=0))  # [R, L]
    return hidden.gather(1, order[..., None].expand_as(hidden))


def _check_shuffle(codec: str, routing: Routing | None, source: FeatureStore) -> None:
    if CODECS[codec].fits:
        raise InputError(
            f"codec {codec} is fitted to what each layer is, which shuffled layers do not allow: "
            "choose --codec bf16"
        )
    identity = source.manifest.identity
    if routing is not None or identity.mixes is not None or identity.shuffled is not None:
        raise InputError(
            "layers are shuffled in a store that holds them in order, and not together with "
            f"--routing: rewrite {source.path} before it was mixed or shuffled"
        )


@dataclass(frozen=True)
class _First:
    """The first captions of a selection, a random sample of it.

    Attributes:
        ids: captions of the source, in the order of the new store, int64 ``[captions]``.
        num_tokens: of each.
    """

    source: FeatureStore
    ids: np.ndarray
    num_tokens: np.ndarray

    def num_captions(self, num_rows: int) -> int:
        """Number of first captions that together have at least ``num_rows`` tokens, or all."""
        stops = np.cumsum(self.num_tokens)
        return min(len(stops), int(np.searchsorted(stops, num_rows)) + 1)

    def read(
        self, num_rows: int, layers: Sequence[int], basis: Sequence[Sequence[float]] | None
    ) -> "torch.Tensor":
        """Hidden states of the first captions, or mixes of them: bfloat16 ``[R, L or K, H]``."""
        import torch

        num = self.num_captions(num_rows)
        if basis is None:
            return self.source.read(self.ids[:num], layers).tensor()
        parts = _parts(self.num_tokens[:num], max(1, BATCH_BYTES // self.source.bytes_per_row()))
        read = (self.source.read(self.ids[part], layers).tensor() for part in parts)
        return torch.cat([mix(hidden, basis).bfloat16() for hidden in read])


def _parts(counts: np.ndarray, num_rows: int) -> Iterator[slice]:
    """Captions of so many tokens each, in runs of at most ``num_rows`` tokens or one caption."""
    stops = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = stops[first] - counts[first]
        stop = max(first + 1, int(np.searchsorted(stops, before + num_rows, side="right")))
        yield slice(first, stop)
        first = stop


def _reading(
    source: FeatureStore, identity: FeatureIdentity
) -> tuple[list[int], list[list[float]] | None]:
    """Layers of the source that a new store is made of, and the basis that mixes them, if any."""
    mixes = identity.mixes
    if mixes is None or source.mixes is not None:
        return identity.layers, None
    return mixes.layers, mixes.basis


def _check_routing(
    routing: Routing | None, rank: Rank | None, layers: str, source: FeatureStore
) -> None:
    """Refuse options that exclude one another, or that this source does not support."""
    if source.mixes is not None and (routing is not None or layers != "all"):
        raise InputError(
            f"{source.path} holds mixes of layers {source.mixes.layers}, which cannot be chosen or "
            "mixed again. Name the store that it was made from."
        )
    if routing is None:
        return
    if rank == "full" or rank == 0:
        raise InputError(f"--rank {rank} with --routing is the number of mixes; expected 1 or more")
    if layers != "all":
        raise InputError(
            f"--layers {layers}: the layers that are mixed are those of the run of --routing; "
            "leave --layers out"
        )
    missing = sorted({*routing.layers} - {*source.layers})
    if missing:
        raise InputError(
            f"{source.path} does not hold layers {missing}, which the run reads; it has "
            f"{source.layers}"
        )


def _asked_for(before: Mixes | None, routing: Routing, rank: int | None) -> bool:
    """Whether the mixes of an existing store are those requested now."""
    if before is None or (before.tolerance is None) != (rank is not None):
        return False
    keys = set(Routing.model_fields)
    return rank in (None, before.num_mixes) and not differences(
        before.model_dump(include=keys), routing.model_dump(include=keys)
    )


def _describe_mixes(mixes: Mixes) -> str:
    errors = ", ".join(f"{rank}: {error:.1e}" for rank, error in enumerate(mixes.errors, 1))
    blocks = "all blocks" if len(mixes.weights) == 1 else f"{len(mixes.weights)} blocks"
    return (
        f"{mixes.num_mixes} mixes of {len(mixes.layers)} layers for {blocks}, strategy "
        f"{mixes.strategy}; mean error of what blocks read by number of mixes: {errors}"
    )


def _choose_layers(text: str, source: FeatureStore) -> list[int]:
    from ..models.llm import parse_layers

    if text == "all":
        return source.layers
    identity = source.manifest.identity
    held = "normed" if identity.final_norm == "absent" else identity.final_norm
    chosen = parse_layers(text, identity.model.num_layers, held)
    missing = sorted({*chosen} - {*source.layers})
    if missing:
        raise InputError(
            f"--layers {text}: {source.path} does not hold {missing}; it has {source.layers}"
        )
    return chosen


def _select(source: FeatureStore, file: str | None, options: dict[str, Any]) -> _Selection:
    """Captions that a file names, or all."""
    if file is None:
        ids = np.arange(len(source))
        return _Selection(ids, source.samples, source.manifest.identity.samples)
    samples = read_samples(file, **options, need="text")
    texts = samples.texts()
    found = pc.index_in(
        texts.flatten(), value_set=source.captions["text"].cast(texts.type.value_type)
    )
    if found.null_count:
        missing = texts.flatten().filter(pc.is_null(found))
        raise InputError(
            f"{file}: {found.null_count:,} captions are not in {source.path}, for example "
            f"{missing[0].as_py()!r}. Name captions that were extracted, or extract these."
        )
    old = found.to_numpy().astype(np.int64)
    ids = np.unique(np.concatenate([[0], old]))
    counts = numbers(pc.list_value_length(texts))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    renumbered = pa.array(np.searchsorted(ids, old), pa.int64())
    table = pa.table(
        [
            pa.array(range(len(samples)), pa.int64()),
            pa.ListArray.from_arrays(offsets, renumbered),
            samples.image_names(),
        ],
        schema=SAMPLES_SCHEMA,
    )
    return _Selection(ids, with_extra(table, samples), samples.identity())


def _captions_table(table: pa.Table, packing: Packing) -> pa.Table:
    num_tokens = numbers(table["num_tokens"])
    placed = {
        "caption_id": np.arange(table.num_rows),
        "shard": packing.shard,
        "row_start": packing.row_start,
        "row_stop": packing.row_start + num_tokens,
    }
    for name, values in placed.items():
        place = table.schema.get_field_index(name)
        field = CAPTIONS_SCHEMA.field(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table
