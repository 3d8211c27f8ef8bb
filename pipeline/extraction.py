"""Captions -> feature store: the plan, and the task that encodes one shard.

Everything about a store is known before its first shard: the plan reads, deduplicates, tokenises
and packs. A shard is one task; its batches are fixed by the plan, so that encoding it again gives
the same bytes. Work that remains is what has no receipt.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..schemas import (
    CAPTIONS_SCHEMA,
    Codec,
    FeatureIdentity,
    FeatureManifest,
    Fit,
    InputError,
    Mixes,
    Receipt,
    differences,
)
from .captions import Captions, build_captions
from .cluster import Cluster, report_progress
from .codecs import CODECS, Bf16, Coded, Predictive
from .distortion import CodecError
from .filling import at_work, check_space, fill, provenance
from .fitting import fit_codec, fit_rows, request_codec
from .growth import added_bytes, check_rows, generations, grow
from .layout import Packing, batches, format_bytes, pack
from .mixing import mix
from .parameters import digest_parameters
from .places import look_at_workers, own_device
from .planning import default_batch_tokens, make_plan
from .progress import Style
from .store import FeatureStore, Rows

if TYPE_CHECKING:
    import torch

    from .encoder import Encoder, Source

SINK_RATIO = 20.0
"""A first kept token whose norm is this many times that of the others, in any layer, is the LLM's
attention sink: its meaning is lost (on SmolLM2 without BOS the ratio exceeds 100)."""
_model_in_use = threading.Lock()
"""A model serves one task at a time, however many threads a worker was given."""


@dataclass(frozen=True)
class EncodedPrompts:
    """Hidden states of a few texts in memory, read as a feature store is.

    Attributes:
        texts: entry 0 is the null caption.
        rows: of all entries.
        layers: of ``rows``.
        mixes: what ``rows`` holds in place of layers, where it does.
    """

    texts: list[str]
    rows: Rows
    layers: list[int]
    mixes: Mixes | None = None

    def read(self, ids: Sequence[int] | np.ndarray, layers: Sequence[int] | None = None) -> Rows:
        """As :meth:`semroute.pipeline.store.FeatureStore.read`."""
        offsets = self.rows.offsets
        wanted = [self.layers.index(layer) for layer in (layers or self.layers)]
        parts = [self.rows.bits[offsets[i] : offsets[i + 1]][:, wanted] for i in ids]
        ends = np.cumsum([0, *map(len, parts)])
        return Rows(np.concatenate(parts), ends.astype(np.int64))


@dataclass(frozen=True)
class _Job:
    """What every task of an extraction shares."""

    store: Path
    source: "Source"


@dataclass(frozen=True)
class _Task:
    """The captions of one shard; rows count from the shard's start."""

    shard: int
    texts: list[str]
    sequences: list[np.ndarray]
    kept: np.ndarray
    row_start: np.ndarray
    has_null: bool

    @classmethod
    def of(cls, captions: Captions, chosen: slice, shard: int, row_start: np.ndarray) -> "_Task":
        return cls(
            shard=shard,
            texts=captions.texts[chosen],
            sequences=captions.sequences[chosen],
            kept=captions.kept[chosen],
            row_start=row_start,
            has_null=chosen.start == 0,
        )


@dataclass(frozen=True)
class _Fitted:
    """What fitting a codec gave."""

    spec: Codec
    parameters: dict[str, np.ndarray]
    bits_per_value: float


def extract(
    source: str,
    features: str | Path,
    *,
    model: str,
    template: str = "bos",
    text_column: str | None = None,
    layers: str = "all",
    max_length: int = 512,
    keep_prefix: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    codec: Literal["bf16", "lossless", "delta", "linear"] = "delta",
    quality: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard_bytes: int = 256_000_000,
    batch_tokens: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    cluster: str = "local",
    force: bool = False,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
) -> FeatureStore:
    """Run an LLM over captions once and store the hidden states of its layers.

    Called again with the same arguments it continues where it was stopped, by whatever. Called with
    a source that gained rows at its end, it adds new shards to the store and leaves the old ones.

    Args:
        source: table of captions, see :func:`semroute.pipeline.samples.read_samples`.
        features: folder of the store.
        model: hub id, folder or GGUF file, see :func:`semroute.pipeline.encoder.find_model`.
        template: preset or file, see :mod:`semroute.pipeline.captions`.
        layers: ``all``, ``every:3`` or ``5,11,17``.
        max_length: in tokens, the template included.
        keep_prefix: store the template's prefix rows for every caption.
        dtype: in which the LLM runs; auto: as the store was begun, or for a new one bfloat16 on a
            GPU and float32 on a CPU.
        codec: what is stored, see :mod:`semroute.pipeline.codecs`. All but ``bf16`` are fitted to a
            sample of the captions first.
        quality: of ``delta`` and ``linear``, whose step is 2**-quality of a vector's RMS: 4 (the
            default) gives an error of LN(h) of 1.1e-2, one more halves it and costs a bit a value.
        limit: only the first samples.
        seed: of the order in which captions are dealt to shards.
        shard_bytes: size of a full shard.
        batch_tokens: tokens a batch, padding included; default as the store was begun, or for a new
            one 512 on a CPU and 16,384 on a GPU.
        workers: processes; default one a GPU, or one a CPU core up to 4; 0: this one, without Dask.
        threads: CPU threads a worker; default all cores over all workers, on a cluster as many as
            the worker with the fewest has. A store that is continued keeps the number it was begun
            with, so that its bytes do not depend on the workers.
        cluster: where: ``local``, the address or the file of a Dask scheduler, or a job queue; see
            :func:`semroute.pipeline.places.find_cluster`.
        force: begin although the target has too little space.
        report: takes one line of text at a time.
        progress: ``json``: an object a line on standard output, once a second.

    Raises:
        InputError: bad input, before any work; a store that was made otherwise, or that another
            process fills; no such cluster.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    features = Path(features)
    with at_work(features, cluster, workers, report) as machines:
        begun = FeatureStore.begun(features)
        there = look_at_workers(machines, str(features), report)
        if dtype == "auto":
            dtype = "bfloat16" if there.have_gpus else "float32"
            dtype = begun.manifest.identity.dtype if begun is not None else dtype
        plan = make_plan(
            source,
            model=model,
            template=template,
            text_column=text_column,
            layers=layers,
            max_length=max_length,
            keep_prefix=keep_prefix,
            dtype=dtype,
            limit=limit,
            seed=seed,
            begun=begun.manifest if begun else None,
        )
        if begun is not None:
            check_rows(begun, plan)
        captions, identity = plan.captions, plan.identity
        bytes_per_row = 2 * len(identity.layers) * identity.model.width
        spec = request_codec(codec, quality)
        if begun is not None:
            asked = begun.manifest.codec
            spec = asked if (asked.name, asked.quality) == (spec.name, spec.quality) else spec
            threads = begun.manifest.layout.num_threads
            batch_tokens = batch_tokens or begun.manifest.layout.batch_tokens
        packing = pack(
            captions.num_tokens,
            bytes_per_row=bytes_per_row,
            shard_bytes=shard_bytes,
            batch_tokens=batch_tokens or default_batch_tokens(there.have_gpus),
            aligned=CODECS[codec].aligned,
            num_threads=threads or there.threads,
            earlier=[earlier.num_captions for earlier in captions.earlier],
        )
        manifest = FeatureManifest(
            status="extracting",
            identity=identity,
            layout=packing.layout,
            codec=spec,
            provenance=provenance(source, plan.model.name),
            grown_from=generations(plan, packing, begun),
        )
        job = _Job(features.resolve(), plan.model)
        plan.report_warnings(report)
        table = _captions_table(captions, packing)
        if begun is not None and len(manifest.grown_from) > len(begun.manifest.grown_from):
            begun.check_same(manifest.before_growth())
            check_space(features, added_bytes(begun, manifest), force)
            store = grow(begun, manifest, plan.samples_table(), table, report)
        elif begun is not None:
            store = begun
            store.check_same(manifest)
        else:
            fitted = None
            num_bytes = packing.layout.num_rows * bytes_per_row
            if CODECS[codec].fits:
                machines.limit(packing.layout.num_shards)
                fitted = _fit(job, manifest, captions, machines, report)
                manifest = manifest.model_copy(update={"codec": fitted.spec})
                num_bytes = int(num_bytes * fitted.bits_per_value / 16)
            check_space(features, num_bytes, force)
            parameters = fitted.parameters if fitted else None
            store = FeatureStore.create(features, manifest, table, plan.samples_table(), parameters)

        remaining = store.remaining()
        machines.limit(len(remaining))

        def arguments(shard: int) -> tuple[_Job, _Task]:
            entries = packing.entries(shard)
            chosen = slice(entries.start, entries.stop)
            row_start = packing.row_start[chosen] - shard * packing.layout.rows_per_shard
            return job, _Task.of(captions, chosen, shard, row_start)

        report(
            f"{len(plan.samples):,} samples, {len(captions):,} unique captions, "
            f"{packing.layout.num_rows:,} tokens x {len(identity.layers)} layers x "
            f"{identity.model.width}: {format_bytes(packing.layout.num_rows * bytes_per_row)}; "
            f"shards: {packing.layout.num_shards}, to do: {len(remaining)}, {machines}"
        )
        fill(
            store,
            remaining,
            _encode_shard,
            arguments,
            packing,
            cluster=machines,
            unit="captions",
            report=report,
            style=progress,
        )
    return store


def encode_prompts(texts: Sequence[str], identity: FeatureIdentity, model: str) -> EncodedPrompts:
    """Encode new texts as a store's captions were: same LLM, template, layers and dtype.

    Each text is a batch of its own and kept in bfloat16, so it equals a stored caption but for
    rounding and for the error of the store's codec.

    Args:
        texts: entry i of the result is ``texts[i - 1]``.
        identity: of the store whose features the reader was made for.
        model: where the LLM is, see :func:`semroute.pipeline.encoder.find_model`.

    Raises:
        InputError: no model there, or not the one of the identity.
    """
    import torch

    from .encoder import Encoder, describe_model, find_model, load_tokenizer, tokenizer_digest

    located = find_model(model)
    tokenizer = load_tokenizer(located)
    found = {"model": describe_model(located), "tokenizer": tokenizer_digest(tokenizer)}
    different = [
        difference
        for key, value in found.items()
        for difference in differences(value, getattr(identity, key), key)
    ]
    if different:
        listed = "\n  ".join(map(str, different))
        raise InputError(
            f"--model {model} is not the LLM of the features:\n  {listed}\nName that one."
        )
    captions = build_captions(
        pa.array([[text] for text in texts], pa.list_(pa.string())),
        tokenizer,
        template=identity.template.text,
        max_length=identity.max_length,
        keep_prefix=identity.template.keep_prefix,
        causal=identity.model.causal,
    )
    layers = identity.llm_layers
    encoder = Encoder(located, layers, identity.dtype)
    entries = [0, *(ids[0] for ids in captions.caption_ids.to_pylist())]
    codec = Bf16(len(layers), identity.model.width)
    codes: list[np.ndarray] = []
    for entry in entries:
        rows = int(captions.num_tokens[entry])
        part = np.empty((rows, len(layers), identity.model.width), np.uint16)

        def sink(index: int, hidden: "torch.Tensor", part: np.ndarray = part) -> None:
            part[:, index] = codec.encode(index, hidden, None).planes["hidden"].cpu().numpy()

        encoder.encode([captions.sequences[entry]], [int(captions.kept[entry])], sink)
        codes.append(part)
    offsets = np.cumsum([0, *map(len, codes)]).astype(np.int64)
    encoded = Rows(np.concatenate(codes), offsets)
    if identity.mixes is not None:
        mixed = mix(encoded.tensor(), identity.mixes.basis).bfloat16()
        encoded = Rows(mixed.view(torch.uint16).numpy(), offsets)
    return EncodedPrompts(["", *texts], encoded, identity.layers, identity.mixes)


def _encode_shard(job: _Job, task: _Task) -> Receipt:
    """Encode and write one shard, then its receipt. Runs in a worker."""
    with _model_in_use:
        return _encode(job, task)


def _encode(job: _Job, task: _Task) -> Receipt:
    import torch

    started = time.perf_counter()
    store = FeatureStore.open(job.store, complete=False)
    manifest = store.manifest
    torch.set_num_threads(manifest.layout.num_threads)
    layers = manifest.identity.layers
    encoder = _load_encoder(job.source, tuple(layers), manifest.identity.dtype, own_device())
    loaded = time.perf_counter()
    codec = store.codec
    planes = {
        plane.name: np.zeros((manifest.layout.rows_per_shard, len(layers), plane.size), plane.dtype)
        for plane in codec.planes
    }
    norms = np.zeros((len(layers), manifest.layout.rows_per_shard), np.float32)
    error = CodecError(layers)
    coded: Coded | None = None

    def sink(index: int, hidden: "torch.Tensor", rows: np.ndarray) -> None:
        nonlocal coded
        norms[index, rows] = torch.linalg.vector_norm(hidden.float(), dim=-1).cpu().numpy()
        _check_finite(norms[index], layers[index], task)
        coded = codec.encode(index, hidden, coded if index else None)
        error.add(index, hidden, coded.hidden)
        for name, codes in coded.planes.items():
            planes[name][rows, index] = codes.cpu().numpy()

    _encode_batches(encoder, task, manifest.layout.batch_tokens, sink)
    encoded = time.perf_counter()
    files = store.write_shard(task.shard, planes)
    receipt = Receipt(
        shard=task.shard,
        num_rows=sum(map(len, task.sequences)) - int(task.kept.sum()),
        num_entries=len(task.texts),
        files=files,
        codec_error=error.to_dict(),
        layer_error=error.by_layer(),
        warnings=_sink_warnings(norms, layers, task),
        seconds={
            "load": loaded - started,
            "encode": encoded - loaded,
            "write": time.perf_counter() - encoded,
        },
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )
    store.write_receipt(receipt)
    return receipt


@lru_cache(maxsize=1)
def _load_encoder(
    source: "Source", layers: tuple[int, ...], dtype: Literal["float32", "bfloat16"], device: str
) -> "Encoder":
    """The model, loaded once a worker."""
    from transformers.utils import logging

    from .encoder import Encoder

    logging.disable_progress_bar()
    return Encoder(source, layers, dtype, device)


def _encode_batches(
    encoder: "Encoder",
    task: _Task,
    batch_tokens: int,
    sink: Callable[[int, "torch.Tensor", np.ndarray], None],
) -> None:
    """Run a task's captions through the LLM; the sink also gets the rows where they belong."""
    lengths = np.array([len(sequence) for sequence in task.sequences])
    done = 0
    for batch in batches(lengths, batch_tokens):
        starts, counts = task.row_start[batch], (lengths - task.kept)[batch]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])

        def take(index: int, hidden: "torch.Tensor", rows: np.ndarray = rows) -> None:
            sink(index, hidden, rows)

        encoder.encode([task.sequences[i] for i in batch], task.kept[batch].tolist(), take)
        done += len(batch)
        report_progress(task.shard, done)


def _fit(
    job: _Job,
    manifest: FeatureManifest,
    captions: Captions,
    machines: Cluster,
    report: Callable[[str], None],
) -> _Fitted:
    """Fit the codec to the first captions in store order, in a worker, before anything is kept."""
    wanted = fit_rows(manifest.identity.model.width)
    stops = np.cumsum(captions.num_tokens)
    num = min(len(captions), int(np.searchsorted(stops, wanted)) + 1)
    task = _Task.of(captions, slice(0, num), 0, stops[:num] - captions.num_tokens[:num])
    name = manifest.codec.name
    with tqdm(total=num, unit=" captions", desc=f"fit {name}") as bar:

        def show(_: int, done: int) -> None:
            bar.update(done - bar.n)

        outcomes = machines.run([0], _fit_codec, lambda _: (job, task, manifest), on_progress=show)
        ((_, fitted),) = outcomes
    if isinstance(fitted, BaseException):
        raise InputError(f"the codec could not be fitted: {fitted}") from fitted
    report(
        f"codec {name} fitted to {num:,} captions, {int(stops[num - 1]):,} tokens: "
        f"{16 / fitted.bits_per_value:.2f}x smaller than bf16 there"
    )
    return fitted


def _fit_codec(job: _Job, task: _Task, manifest: FeatureManifest) -> _Fitted:
    """Encode a sample and fit the codec to it. Runs in a worker."""
    with _model_in_use:
        return _fit_to(job, task, manifest)


def _fit_to(job: _Job, task: _Task, manifest: FeatureManifest) -> _Fitted:
    import torch

    torch.set_num_threads(manifest.layout.num_threads)
    identity, device = manifest.identity, own_device()
    encoder = _load_encoder(job.source, tuple(identity.layers), identity.dtype, device)
    num_rows = sum(map(len, task.sequences)) - int(task.kept.sum())
    shape = (num_rows, len(identity.layers), identity.model.width)
    sample = torch.empty(shape, dtype=getattr(torch, identity.dtype))

    def sink(index: int, hidden: "torch.Tensor", rows: np.ndarray) -> None:
        norms = torch.linalg.vector_norm(hidden.float(), dim=-1).cpu().numpy()
        spread = np.zeros(num_rows, np.float32)
        spread[rows] = norms
        _check_finite(spread, identity.layers[index], task)
        sample[torch.from_numpy(rows), index] = hidden.cpu()

    _encode_batches(encoder, task, manifest.layout.batch_tokens, sink)
    spec = manifest.codec
    codec, bits_per_value = fit_codec(spec.name, sample, spec.quality)
    fit = Fit(
        num_captions=len(task.texts),
        num_rows=num_rows,
        sha256=digest_parameters(codec.parameters),
    )
    code_bits = codec.code_bits if isinstance(codec, Predictive) else None
    spec = spec.model_copy(update={"fit": fit, "code_bits": code_bits})
    return _Fitted(spec, dict(codec.parameters), bits_per_value)


def _check_finite(norms: np.ndarray, layer: int, task: _Task) -> None:
    """Refuse NaN and infinity, by the norms of a layer's rows, before they are coded."""
    rows = np.flatnonzero(~np.isfinite(norms))
    if len(rows):
        entry = int(np.searchsorted(task.row_start, rows[0], side="right")) - 1
        raise ValueError(
            f"hidden states of layer {layer} are not finite for the caption "
            f"{task.texts[entry]!r}; with --dtype bfloat16 try float32"
        )


def _sink_warnings(norms: np.ndarray, layers: Sequence[int], task: _Task) -> list[str]:
    """Whether first kept tokens look like attention sinks."""
    counts = np.array([len(s) for s in task.sequences]) - task.kept
    eligible = counts > 1
    eligible[0] &= not task.has_null
    if not eligible.any():
        return []
    first = task.row_start[eligible]
    others = np.concatenate(
        [np.arange(s + 1, s + n) for s, n in zip(first, counts[eligible], strict=True)]
    )
    ratios = np.median(norms[:, first], axis=1) / np.median(norms[:, others], axis=1)
    worst = int(ratios.argmax())
    if ratios[worst] < SINK_RATIO:
        return []
    return [
        f"the first stored token of captions looks like the LLM's attention sink (from layer "
        f"{layers[int((ratios >= SINK_RATIO).argmax())]} its norm is over {SINK_RATIO:.0f} times "
        "that of other tokens): its meaning is lost. Put BOS or words in front with --template, "
        "and leave --keep-prefix off."
    ]


def _captions_table(captions: Captions, packing: Packing) -> pa.Table:
    tokens = [s[k:] for s, k in zip(captions.sequences, captions.kept, strict=True)]
    columns = [
        range(len(captions)),
        captions.texts,
        tokens,
        captions.num_tokens,
        captions.num_cut,
        packing.shard,
        packing.row_start,
        packing.row_start + captions.num_tokens,
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, CAPTIONS_SCHEMA, strict=True)]
    return pa.table(arrays, schema=CAPTIONS_SCHEMA)
