"""Captions -> feature store: plan, fit the codec, deal out shards.

Everything about a store is known before its first shard: the plan reads, deduplicates, tokenises
and packs. A shard is one task. Work that remains is what has no receipt.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from ...schemas import FeatureManifest, InputError
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ..codecs.fit import fit_rows
from ..codecs.registry import CODECS, request_codec
from ..executor.base import Executor
from ..executor.progress import Style, open_reporter
from ..executor.workers import inspect_workers
from ..models.packing import NUM_CAPTIONS
from ..store.features import FeatureStore
from ..store.layout import pack
from ..text.captions import Captions
from .append import added_bytes, append, check_rows, generations
from .driver import check_space, exclusive_writer, provenance, run_shards
from .plan import LINE_TOKENS, Plan, default_batch_tokens, make_plan
from .worker import Fitted, Job, ShardTask, encode_shard, fit_sample, try_packing

Batching = Literal["auto", "padded", "packed"]


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
    batching: Batching = "auto",
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
        source: table of captions, see :func:`semroute.pipeline.sources.table.read_samples`.
        features: folder of the store, or the URL of one in an object store that fsspec knows.
        model: hub id, folder or GGUF file, see :func:`semroute.pipeline.models.hub.find_model`.
        template: preset or file, see :mod:`semroute.pipeline.text.captions`.
        layers: ``all``, ``every:3`` or ``1-10,17``.
        max_length: in tokens, the template included.
        keep_prefix: store the template's prefix rows for every caption.
        dtype: in which the LLM runs; auto: as the store was begun, or for a new one bfloat16 on a
            GPU and float32 on a CPU.
        codec: what is stored, see :mod:`semroute.pipeline.codecs.base`. All but ``bf16`` are
            fitted to a sample of the captions first.
        quality: of ``delta`` and ``linear``, whose step is 2**-quality of a vector's RMS: 4 (the
            default) gives an error of LN(h) of 1.1e-2, one more halves it and costs a bit a value.
        limit: only the first samples.
        seed: of the order in which captions are dealt to shards.
        shard_bytes: size of a full shard.
        batch_tokens: tokens a batch, padding included; default as the store was begun, or for a new
            one 512 on a CPU and 16,384 on a GPU.
        batching: ``padded``: a line of a batch is one caption, padded to the longest; ``packed``:
            several, one after the other, which the LLM must keep apart; auto: as the store was
            begun, or for a new one packed where a trial of the LLM shows that it does.
        workers: processes; default one a GPU, or one a CPU core up to 4; 0: this one, without Dask.
        threads: CPU threads a worker; default all cores over all workers, on a cluster as many as
            the worker with the fewest has. A store that is continued keeps the number it was begun
            with, so that its bytes do not depend on the workers.
        cluster: where: ``local``, the address or the file of a Dask scheduler, or a job queue; see
            :func:`semroute.pipeline.executor.connect.connect`.
        force: begin although the target has too little space.
        report: takes one line of text at a time.
        progress: ``json``: an object a line on standard output, once a second.

    Raises:
        InputError: bad input, before any work; a store that was made otherwise, or that another
            process fills; no such cluster; packed, and the LLM does not keep captions apart.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    features = locate(features)
    with exclusive_writer(features, cluster, workers, report) as executor:
        begun = FeatureStore.begun(features)
        there = inspect_workers(executor, str(features), report)
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
        job = Job(features.resolve(), plan.model)
        if begun is not None:
            line_tokens = begun.manifest.layout.line_tokens if batching != "padded" else None
            against = "" if line_tokens else f"{features} was begun with padded ones"
        elif batching == "padded":
            line_tokens, against = None, ""
        else:
            executor.limit(packing.layout.num_shards)
            against = _try(job, plan, executor)
            line_tokens = None if against else LINE_TOKENS
        if against and batching == "packed":
            raise InputError(f"--batching packed: {against}; take auto or padded")
        if against and begun is None:
            report(f"batches are padded: {against}")
        manifest = FeatureManifest(
            status="extracting",
            identity=identity,
            layout=packing.layout.model_copy(update={"line_tokens": line_tokens}),
            codec=spec,
            provenance=provenance(source, plan.model.name),
            grown_from=generations(plan, packing, begun),
        )
        plan.report_warnings(report)
        table = plan.captions_table(packing)
        if begun is not None and len(manifest.grown_from) > len(begun.manifest.grown_from):
            begun.check_same(manifest.before_growth())
            check_space(features, added_bytes(begun, manifest), force)
            tables = {"samples": plan.samples_table(), "captions": table}
            store = append(begun, manifest, tables, report)
        elif begun is not None:
            store = begun
            store.check_same(manifest)
        else:
            fitted = None
            num_bytes = packing.layout.num_rows * bytes_per_row
            if CODECS[codec].fits:
                fitted = _fit(job, manifest, captions, executor, report)
                manifest = manifest.model_copy(update={"codec": fitted.spec})
                num_bytes = int(num_bytes * fitted.bits_per_value / 16)
            check_space(features, num_bytes, force)
            parameters = fitted.parameters if fitted else None
            store = FeatureStore.create(features, manifest, table, plan.samples_table(), parameters)

        remaining = store.remaining()
        executor.limit(len(remaining))

        def arguments(shard: int) -> tuple[Job, ShardTask]:
            entries = packing.entries(shard)
            chosen = slice(entries.start, entries.stop)
            row_start = packing.row_start[chosen] - shard * packing.layout.rows_per_shard
            return job, ShardTask.of(captions, chosen, shard, row_start)

        report(
            f"{len(plan.samples):,} samples, {len(captions):,} unique captions, "
            f"{packing.layout.num_rows:,} tokens x {len(identity.layers)} layers x "
            f"{identity.model.width}: {format_bytes(packing.layout.num_rows * bytes_per_row)}; "
            f"shards: {packing.layout.num_shards}, to do: {len(remaining)}, {executor}"
        )
        run_shards(
            store,
            remaining,
            encode_shard,
            arguments,
            packing,
            executor=executor,
            report=report,
            listener=open_reporter(progress, "captions"),
        )
    return store


def _some(captions: Captions, chosen: slice) -> ShardTask:
    """Captions as a task that is no shard's."""
    counts = captions.num_tokens[chosen]
    return ShardTask.of(captions, chosen, 0, np.cumsum(counts) - counts)


def _try(job: Job, plan: Plan, executor: Executor) -> str:
    """Try in a worker whether captions can be packed: why not, or ""."""
    captions = plan.captions
    chosen = slice(min(1, len(captions) - 1), 1 + NUM_CAPTIONS)  # the null caption is short
    task = _some(captions, chosen)
    outcomes = executor.run(
        [0], try_packing, lambda _: (job, task, plan.identity), on_progress=lambda *_: None
    )
    ((_, found),) = outcomes
    if isinstance(found, BaseException):
        raise InputError(f"the LLM could not be tried: {found}") from found
    return found


def _fit(
    job: Job,
    manifest: FeatureManifest,
    captions: Captions,
    executor: Executor,
    report: Callable[[str], None],
) -> Fitted:
    """Fit the codec to the first captions in store order, in a worker, before anything is kept."""
    wanted = fit_rows(manifest.identity.model.width)
    stops = np.cumsum(captions.num_tokens)
    num = min(len(captions), int(np.searchsorted(stops, wanted)) + 1)
    task = _some(captions, slice(0, num))
    name = manifest.codec.name
    with tqdm(total=num, unit=" captions", desc=f"fit {name}") as bar:

        def show(_: int, done: int) -> None:
            bar.update(done - bar.n)

        outcomes = executor.run([0], fit_sample, lambda _: (job, task, manifest), on_progress=show)
        ((_, fitted),) = outcomes
    if isinstance(fitted, BaseException):
        raise InputError(f"the codec could not be fitted: {fitted}") from fitted
    for warning in fitted.warnings:
        report(f"warning: {warning}")
    report(
        f"codec {name} fitted to {num:,} captions, {int(stops[num - 1]):,} tokens: "
        f"{16 / fitted.bits_per_value:.2f}x smaller than bf16 there"
    )
    return fitted
