"""Captions -> feature store: the plan, and the task that encodes one shard.

Everything about a store is known before its first shard: the plan reads, deduplicates, tokenises
and packs. A shard is one task; its batches are fixed by the plan, so that encoding it again gives
the same bytes. Work that remains is what has no receipt.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from ..schemas import (
    CAPTIONS_SCHEMA,
    SAMPLES_SCHEMA,
    Codec,
    FeatureIdentity,
    FeatureManifest,
    InputError,
    Receipt,
    differences,
)
from .captions import Captions, build_captions, read_template
from .cluster import num_cpus, report_progress
from .codecs import CODECS, CodecError
from .filling import check_space, fill, name_workers, num_workers, provenance
from .layout import Packing, batches, format_bytes, pack
from .samples import read_samples
from .store import FeatureStore, Rows

if TYPE_CHECKING:
    import torch

    from .encoder import Encoder, Source

SINK_RATIO = 20.0
"""A first kept token whose norm is this many times that of the others, in any layer, is the LLM's
attention sink: its meaning is lost (on SmolLM2 without BOS the ratio exceeds 100)."""
CPU_BATCH_TOKENS = 512
"""Best of 128 to 4,096 on two CPU cores with SmolLM2-135M."""
GPU_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class EncodedPrompts:
    """Hidden states of a few texts in memory, read as a feature store is.

    Attributes:
        texts: entry 0 is the null caption.
        rows: of all entries.
        layers: of ``rows``.
    """

    texts: list[str]
    rows: Rows
    layers: list[int]

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
    limit: int | None = None,
    seed: int = 0,
    shard_bytes: int = 256_000_000,
    batch_tokens: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> FeatureStore:
    """Run an LLM over captions once and store the hidden states of its layers.

    Called again with the same arguments it continues where it was stopped, by whatever.

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
        limit: only the first samples.
        seed: of the order in which captions are dealt to shards.
        shard_bytes: size of a full shard.
        batch_tokens: tokens a batch, padding included; default as the store was begun, or for a new
            one 512 on a CPU and 16,384 on a GPU.
        workers: processes; default one a GPU, or one a CPU core up to 4; 0: this one, without Dask.
        threads: CPU threads a worker; default all cores over all workers. A store that is continued
            keeps the number it was begun with, so that its bytes do not depend on the workers.
        force: begin although the target has too little space.
        report: takes one line of text at a time.

    Raises:
        InputError: bad input, before any work; or a store that was made otherwise.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    import torch

    from .encoder import (
        ATTENTION,
        describe_model,
        find_model,
        load_tokenizer,
        parse_layers,
        tokenizer_digest,
    )

    features = Path(features)
    template_text = read_template(template)
    samples = read_samples(source, text_column=text_column, limit=limit, need="text")
    texts = samples.texts()
    located = find_model(model)
    identity = describe_model(located)
    chosen = parse_layers(layers, identity.num_layers)
    tokenizer = load_tokenizer(located)
    captions = build_captions(
        texts,
        tokenizer,
        template=template_text,
        max_length=max_length,
        keep_prefix=keep_prefix,
        seed=seed,
    )
    on_gpu = torch.cuda.is_available()
    workers = num_workers(workers, torch.cuda.device_count())
    begun = FeatureStore.begun(features)
    if begun is not None:
        threads = begun.manifest.layout.num_threads
        batch_tokens = batch_tokens or begun.manifest.layout.batch_tokens
        dtype = begun.manifest.identity.dtype if dtype == "auto" else dtype
    packing = pack(
        captions.num_tokens,
        bytes_per_row=2 * len(chosen) * identity.width,
        shard_bytes=shard_bytes,
        batch_tokens=batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS),
        num_threads=threads or max(1, num_cpus() // max(1, workers)),
    )
    manifest = FeatureManifest(
        status="extracting",
        identity=FeatureIdentity(
            model=identity,
            tokenizer=tokenizer_digest(tokenizer),
            template=captions.template,
            layers=chosen,
            final_norm="normed" if chosen[-1] == identity.num_layers else "absent",
            dtype=("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype,
            attention=ATTENTION,
            max_length=max_length,
            captions=captions.identity,
            samples=samples.identity(),
        ),
        layout=packing.layout,
        codec=Codec(name="bf16"),
        provenance=provenance(source, located.name),
    )
    if begun is not None:
        store = begun
        store.check_same(manifest)
    else:
        bytes_per_row = 2 * len(chosen) * identity.width
        check_space(features, packing.layout.num_rows * bytes_per_row, force)
        table = _captions_table(captions, packing)
        sample_table = pa.table(
            [
                pa.array(range(len(samples)), pa.int64()),
                captions.caption_ids,
                samples.image_names(),
            ],
            schema=SAMPLES_SCHEMA,
        )
        store = FeatureStore.create(features, manifest, table, sample_table)
    _report_cuts(captions, max_length, report)

    remaining = store.remaining()
    workers = min(workers, len(remaining))
    job = _Job(features.resolve(), located)

    def arguments(shard: int) -> tuple[_Job, _Task]:
        entries = packing.entries(shard)
        chosen = slice(entries.start, entries.stop)
        return job, _Task(
            shard=shard,
            texts=captions.texts[chosen],
            sequences=captions.sequences[chosen],
            kept=captions.kept[chosen],
            row_start=packing.row_start[chosen] - shard * packing.layout.rows_per_shard,
            has_null=entries.start == 0,
        )

    report(
        f"{len(samples):,} samples, {len(captions):,} unique captions, "
        f"{packing.layout.num_rows:,} tokens x {len(chosen)} layers x {identity.width}: "
        f"{format_bytes(packing.layout.num_rows * store.bytes_per_row())}; "
        f"shards: {packing.layout.num_shards}, to do: {len(remaining)}, {name_workers(workers)}"
    )
    fill(
        store,
        remaining,
        _encode_shard,
        arguments,
        packing,
        workers=workers,
        unit="captions",
        report=report,
    )
    return store


def encode_prompts(texts: Sequence[str], identity: FeatureIdentity, model: str) -> EncodedPrompts:
    """Encode new texts as a store's captions were: same LLM, template, layers, dtype and codec.

    Each text is a batch of its own, so it equals a stored caption but for rounding.

    Args:
        texts: entry i of the result is ``texts[i - 1]``.
        identity: of the store whose features the reader was made for.
        model: where the LLM is, see :func:`semroute.pipeline.encoder.find_model`.

    Raises:
        InputError: no model there, or not the one of the identity.
    """
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
    )
    encoder = Encoder(located, identity.layers, identity.dtype)
    entries = [0, *(ids[0] for ids in captions.caption_ids.to_pylist())]
    codec = CODECS["bf16"]
    codes: list[np.ndarray] = []
    for entry in entries:
        rows = int(captions.num_tokens[entry])
        part = np.empty((rows, len(identity.layers), identity.model.width), codec.dtype)

        def sink(index: int, hidden: "torch.Tensor", part: np.ndarray = part) -> None:
            part[:, index] = codec.encode(hidden).cpu().numpy()

        encoder.encode([captions.sequences[entry]], [int(captions.kept[entry])], sink)
        codes.append(part)
    offsets = np.cumsum([0, *map(len, codes)]).astype(np.int64)
    return EncodedPrompts(["", *texts], Rows(np.concatenate(codes), offsets), identity.layers)


def _encode_shard(job: _Job, task: _Task) -> Receipt:
    """Encode and write one shard, then its receipt. Runs in a worker."""
    import torch

    started = time.perf_counter()
    store = FeatureStore.open(job.store, complete=False)
    manifest = store.manifest
    torch.set_num_threads(manifest.layout.num_threads)
    layers, width = manifest.identity.layers, manifest.identity.model.width
    encoder = _load_encoder(job.source, tuple(layers), manifest.identity.dtype, _device())
    loaded = time.perf_counter()
    codec = CODECS[manifest.codec.name]
    codes = np.zeros((manifest.layout.rows_per_shard, len(layers), width), codec.dtype)
    norms = np.zeros((len(layers), manifest.layout.rows_per_shard), np.float32)
    error = CodecError()
    lengths = np.array([len(sequence) for sequence in task.sequences])
    done = 0
    for batch in batches(lengths, manifest.layout.batch_tokens):
        starts, counts = task.row_start[batch], (lengths - task.kept)[batch]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])

        def sink(index: int, hidden: "torch.Tensor", rows: np.ndarray = rows) -> None:
            coded = codec.encode(hidden)
            error.add(hidden, coded.view(torch.bfloat16))
            codes[rows, index] = coded.cpu().numpy()
            norms[index, rows] = torch.linalg.vector_norm(hidden.float(), dim=-1).cpu().numpy()

        encoder.encode([task.sequences[i] for i in batch], task.kept[batch].tolist(), sink)
        done += len(batch)
        report_progress(task.shard, done)
    _check_finite(norms, layers, task)
    encoded = time.perf_counter()
    files = store.write_shard(task.shard, codes)
    receipt = Receipt(
        shard=task.shard,
        num_rows=int((lengths - task.kept).sum()),
        num_entries=len(task.texts),
        files=files,
        codec_error=error.to_dict(),
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
    """The model, loaded once a worker (which has one thread for tasks)."""
    from transformers.utils import logging

    from .encoder import Encoder

    logging.disable_progress_bar()
    return Encoder(source, layers, dtype, device)


def _device() -> str:
    """The worker's own GPU where there are GPUs (workers of a LocalCluster are named 0, 1, ...)."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    from distributed import get_worker

    try:
        return f"cuda:{int(get_worker().name) % torch.cuda.device_count()}"
    except ValueError:  # no worker: this is the driver's own process
        return "cuda:0"


def _check_finite(norms: np.ndarray, layers: Sequence[int], task: _Task) -> None:
    index, row = np.nonzero(~np.isfinite(norms))
    if len(row):
        entry = int(np.searchsorted(task.row_start, row[0], side="right")) - 1
        raise ValueError(
            f"hidden states of layer {layers[index[0]]} are not finite for the caption "
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


def _report_cuts(captions: Captions, max_length: int, report: Callable[[str], None]) -> None:
    cut = np.flatnonzero(captions.num_cut)
    if len(cut):
        report(
            f"warning: {len(cut):,} captions are longer than {max_length} tokens and lose their "
            f"end (captions.parquet has num_cut_tokens), for example:"
        )
        for entry in cut[np.argsort(-captions.num_cut[cut], kind="stable")[:3]]:
            text = captions.texts[entry]
            shown = text if len(text) <= 70 else f"{text[:67]}..."
            report(f"  -{captions.num_cut[entry]} tokens: {shown!r}")
