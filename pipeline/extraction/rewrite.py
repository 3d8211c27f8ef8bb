"""Feature store -> feature store: another codec, fewer layers, their mixes, fewer captions.

No LLM is run. Shapes: R rows (tokens), L layers, K mixes of them, D blocks, H width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import (
    CAPTIONS_SCHEMA,
    SAMPLES_SCHEMA,
    CaptionsIdentity,
    Derived,
    FeatureIdentity,
    FeatureManifest,
    InputError,
    Mixes,
    Receipt,
    Routing,
    SamplesIdentity,
    differences,
    fingerprint,
)
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ..codecs.array_spec import allocate
from ..codecs.base import Coded
from ..codecs.error import CodecError, codec_error
from ..codecs.fit import fit_codec, fit_rows, fitted_spec
from ..codecs.mixes import SAMPLE_ROWS, combine, find_mixes, mix
from ..codecs.registry import CODECS, request_codec
from ..executor.base import Deferred, report_progress, worker_name
from ..executor.progress import Style, open_reporter
from ..executor.workers import inspect_workers
from ..sources.table import read_samples
from ..store.features import FeatureStore
from ..store.layout import Packing, pack, rows_of
from ..store.open import open_features
from .driver import check_space, exclusive_writer, provenance, run_shards

if TYPE_CHECKING:
    import torch


BATCH_BYTES = 64_000_000
"""Decoded bytes of the source that a worker holds at a time."""


@dataclass(frozen=True)
class _Job:
    """What every task of a rewriting shares."""

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
    codec: str | None = None,
    quality: float | None = None,
    layers: str = "all",
    routing: Routing | None = None,
    rank: int | None = None,
    shuffle_layers: int | None = None,
    captions: str | None = None,
    text_column: str | None = None,
    shard_bytes: int = 256_000_000,
    workers: int | None = None,
    cluster: str = "local",
    force: bool = False,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
) -> FeatureStore:
    """Write a complete feature store once more, otherwise.

    Called again with the same arguments it continues where it was stopped. Receipts have what is
    lost here; what the source had lost is in the manifest (``derived``); at most the two add up.

    Args:
        features: what to rewrite.
        out: a new folder, or a URL.
        codec, quality: as for extraction; default the codec of the source.
        layers: ``all`` of the source, ``every:3`` or ``1-10,17``, all of which it must hold.
        routing: store only mixes of the layers, enough of them for what its blocks read. That the
            source is of the run's LLM is for the caller to check.
        rank: how many mixes; default the fewest whose mean error is under 1e-2.
        shuffle_layers: a seed: within each caption its layers change places at random, so that no
            layer can be told from another. A control: what routing still gains on such features
            does not come from choosing layers. Of codec ``bf16``.
        captions: table of captions, all of which the source must hold; default all of them. The
            samples of the new store are its rows.
        text_column: of ``captions``.
        shard_bytes: size of a full shard, uncompressed.
        workers: processes; default one a CPU core up to 4; 0: this one, without Dask.
        cluster, force, report, progress: as for extraction.

    Raises:
        InputError: bad input, before any work; or a store that was made otherwise.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    out = locate(out)
    source = open_features(features)
    if str(out.resolve()) == str(source.path.resolve()):
        raise InputError(f"{out} is the store itself; name a new folder")
    identity = source.manifest.identity
    chosen = _choose_layers(layers, source)
    _check_routing(routing, rank, layers, source)
    if shuffle_layers is not None:
        _check_shuffle(codec or source.manifest.codec.name, routing, source)
    selection = _select(source, captions, text_column)
    if codec is None:
        codec = source.manifest.codec.name
        quality = source.manifest.codec.quality if quality is None else quality
    spec = request_codec(codec, quality)
    with exclusive_writer(out, cluster, workers, report, gpus=0) as executor:
        inspect_workers(executor, str(out), report)
        begun = FeatureStore.begun(out)
        if begun is not None:
            asked = begun.manifest.codec
            spec = asked if (asked.name, asked.quality) == (spec.name, spec.quality) else spec
        table = source.captions.take(pa.array(selection.ids))
        num_tokens = table["num_tokens"].to_numpy()
        first = _First(source, selection.ids, num_tokens)
        mixes, final_layer = identity.mixes, identity.llm_layers[-1]
        if routing is None:
            last_layer = chosen[-1] if mixes is None else final_layer
        else:
            before = None if begun is None else begun.manifest.identity.mixes
            mixes = before if _asked_for(before, routing, rank) else None
            if mixes is None:
                sample = first.read(SAMPLE_ROWS, routing.layers, None)
                mixes = find_mixes(routing, sample, rank)
            report(_describe_mixes(mixes))
            chosen, last_layer = [*range(1, mixes.num_mixes + 1)], mixes.layers[-1]
        bytes_per_row = 2 * len(chosen) * identity.model.width
        packing = pack(
            num_tokens,
            bytes_per_row=bytes_per_row,
            shard_bytes=shard_bytes,
            batch_tokens=source.manifest.layout.batch_tokens,
            aligned=CODECS[codec].aligned,
        )
        error = codec_error(list(source.receipts().values()))
        manifest = FeatureManifest(
            status="extracting",
            identity=identity.model_copy(
                update={
                    "layers": chosen,
                    "mixes": mixes,
                    "shuffled": identity.shuffled if shuffle_layers is None else shuffle_layers,
                    "final_norm": identity.final_norm if last_layer == final_layer else "absent",
                    "captions": CaptionsIdentity(
                        num_captions=len(selection.ids),
                        fingerprint=fingerprint(table["text"]),
                        seed=identity.captions.seed,
                    ),
                    "samples": selection.identity,
                }
            ),
            layout=packing.layout,
            codec=spec,
            derived=Derived(codec=source.manifest.codec, codec_error=error.get("mean")),
            provenance=provenance(str(features), source.manifest.provenance.model),
        )
        if begun is not None:
            store = begun
            store.check_same(manifest)
        else:
            parameters: dict[str, np.ndarray] = {}
            num_bytes = packing.layout.num_rows * bytes_per_row
            if CODECS[codec].fits:
                num = first.num_captions(fit_rows(identity.model.width))
                report(f"fitting {codec} to {num:,} captions, {num_tokens[:num].sum():,} tokens")
                sample = first.read(
                    fit_rows(identity.model.width), *_reading(source, manifest.identity)
                )
                fitted, bits = fit_codec(codec, sample, spec.quality)
                parameters = dict(fitted.parameters)
                spec = fitted_spec(spec, fitted, num, len(sample))
                manifest = manifest.model_copy(update={"codec": spec})
                num_bytes = int(num_bytes * bits / 16)
            check_space(out, num_bytes, force)
            new = _captions_table(table, packing)
            store = FeatureStore.create(out, manifest, new, selection.samples, parameters)
        remaining = store.remaining()
        executor.limit(len(remaining))
        job = _Job(source.path.resolve(), out.resolve())
        kept = f"{len(chosen)} of {len(source.layers)} layers"
        if mixes is not None:
            kept = f"{len(chosen)} mixes of {len(mixes.layers)} layers"
        tokens = f"{packing.layout.num_rows:,} tokens x {kept}"
        size = format_bytes(packing.layout.num_rows * bytes_per_row)
        report(
            f"{len(selection.ids):,} of {len(source):,} captions, {tokens}: {size} before {codec}; "
            f"shards: {packing.layout.num_shards}, to do: {len(remaining)}, {executor}"
        )

        def arguments(shard: int) -> tuple[_Job, int, np.ndarray]:
            entries = packing.entries(shard)
            return job, shard, selection.ids[entries.start : entries.stop]

        run_shards(
            store,
            remaining,
            _rewrite_shard,
            arguments,
            packing,
            executor=executor,
            report=report,
            listener=open_reporter(progress, "captions"),
        )
    return store


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
    row_start = mine["row_start"].to_numpy() - shard * layout.rows_per_shard
    counts = mine["num_tokens"].to_numpy()
    codec = store.codec
    error = CodecError(layers if mixes is None else range(len(mixes.weights)))
    used = rows_of(row_start, counts)
    planes = allocate(codec.planes, layout.rows_per_shard, len(layers), used)
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
            for name, codes in coded.planes.items():
                planes[name][rows, index] = codes.numpy()
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
    return Deferred(partial(store.complete_shard, planes, receipt))


def _shuffle(
    hidden: "torch.Tensor", ids: np.ndarray, counts: np.ndarray, seed: int
) -> "torch.Tensor":
    """Rows [R, L, H] of captions with their layers in random order, a function of (seed, caption)
    that all rows of a caption share."""
    import torch

    orders = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, caption)))).permutation(
            hidden.shape[1]
        )
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
        """How many captions have at least so many tokens, or all."""
        stops = np.cumsum(self.num_tokens)
        return min(len(stops), int(np.searchsorted(stops, num_rows)) + 1)

    def read(
        self, num_rows: int, layers: Sequence[int], basis: Sequence[Sequence[float]] | None
    ) -> "torch.Tensor":
        """Their hidden states, or mixes of them: bfloat16 ``[R, L or K, H]``."""
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
    """What a new store is made of: layers of the source, and how they are mixed, if they are."""
    mixes = identity.mixes
    if mixes is None or source.mixes is not None:
        return identity.layers, None
    return mixes.layers, mixes.basis


def _check_routing(
    routing: Routing | None, rank: int | None, layers: str, source: FeatureStore
) -> None:
    """Refuse what cannot be asked for together, or of this source."""
    if source.mixes is not None and (routing is not None or layers != "all"):
        raise InputError(
            f"{source.path} holds mixes of layers {source.mixes.layers}, which cannot be chosen or "
            "mixed again. Name the store that it was made from."
        )
    if routing is None:
        if rank is not None:
            raise InputError(f"--rank {rank} is the number of mixes: name a run with --routing")
        return
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
    """Whether mixes that were begun with are those asked for now."""
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
    num_layers = source.manifest.identity.model.num_layers
    chosen = parse_layers(text, num_layers)
    missing = sorted({*chosen} - {*source.layers})
    if missing:
        raise InputError(
            f"--layers {text}: {source.path} does not hold {missing}; it has {source.layers}"
        )
    return chosen


def _select(source: FeatureStore, file: str | None, text_column: str | None) -> _Selection:
    """The captions that a file names, or all."""
    if file is None:
        ids = np.arange(len(source))
        return _Selection(ids, source.samples, source.manifest.identity.samples)
    samples = read_samples(file, text_column=text_column, need="text")
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
    counts = pc.list_value_length(texts).to_numpy()
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
    return _Selection(ids, table, samples.identity())


def _captions_table(table: pa.Table, packing: Packing) -> pa.Table:
    num_tokens = table["num_tokens"].to_numpy()
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
