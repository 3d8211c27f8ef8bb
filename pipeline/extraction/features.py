"""Captions -> feature store: plan, ask a worker twice, run one task per shard.

Everything about a store is known before its first shard: the plan reads, deduplicates, tokenises
and packs. A shard without a receipt remains to be done.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...schemas import FeatureIdentity, FeatureManifest, InputError, TrainConfig, parse
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ...schemas.verbosity import progress_bar
from ..codecs.fit import fit_rows
from ..codecs.registry import CODECS, fitted_before, request_codec, settle_rank, with_exact_layers
from ..executor.base import Executor
from ..executor.progress import Style
from ..executor.workers import Workers
from ..models.packing import NUM_CAPTIONS
from ..store.budget.shards import leave_budget
from ..store.features import FeatureStore
from ..store.layout import pack
from ..text.captions import Captions
from .append import check_rows, generations
from .driver import FeatureStorePlan, provenance, write_store
from .exact import choose_exact_layers
from .plan import LINE_TOKENS, Plan, default_batch_tokens, make_plan
from .requests import ExtractRequest
from .worker import Fitted, Job, ShardTask, encode_shard, fit_sample, try_llm, try_packing


def extract(
    source: str,
    features: str | Path,
    *,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
    **options: Any,
) -> FeatureStore:
    """Run an LLM over captions once and store the hidden states of its layers.

    Called again with the same arguments it resumes where it was stopped, by whatever. Called with a
    source that gained rows at its end, it adds new shards to the store and leaves the old ones.

    Args:
        source, features, options: the fields of
            :class:`semroute.pipeline.extraction.requests.ExtractRequest`; ``features`` is its
            target.
        report: takes one line of text at a time.
        progress: ``json``: one object per line on standard output, once a second.

    Raises:
        InputError: bad input, before any work; a store that was made differently, or that another
            process writes; no such cluster; packed, and the LLM does not keep captions apart.
        ExtractionError: shards failed and are in quarantine.
        Interrupted: Ctrl-C.
    """
    request = parse(
        ExtractRequest, {"source": source, "target": locate(features), **options}, "the extraction"
    )

    def plan(existing: FeatureStore | None, workers: Workers) -> FeaturePlan:
        return plan_features(request, existing, workers)

    return write_store(FeatureStore, plan, request, report, progress)


@dataclass(frozen=True, kw_only=True)
class FeaturePlan(FeatureStorePlan):
    """A feature store to be extracted.

    Attributes:
        followed: configurations of the runs that are followed, with a disk budget.
        request: what was asked for.
        source: samples, captions and LLM.
    """

    function = staticmethod(encode_shard)

    followed: tuple[TrainConfig, ...] = ()
    request: ExtractRequest
    source: Plan

    @property
    def job(self) -> Job:
        """The part of a task that is the same for every shard."""
        return Job(self.path.resolve(), self.source.model)

    def settle(self, executor: Executor, report: Callable[[str], None]) -> "FeaturePlan":
        """Ask a worker whether the LLM keeps packed captions apart, and have it fit the codec."""
        plan = self
        if self.existing is None and self.request.batching != "padded":
            plan = plan._settle_batching(executor, report)
        elif self.existing is None:
            _ask(try_llm, self.job, self.source, executor)
        self.source.report_warnings(report)
        if self.existing is None and CODECS[self.request.codec].fits:
            plan = plan._settle_codec(executor, report)
        return plan

    def tables(self) -> dict[str, pa.Table]:
        return {
            "samples": self.source.samples_table(),
            "captions": self.source.captions_table(self.packing),
        }

    def first_tables(self) -> tuple[pa.Table | pa.RecordBatchReader, pa.Table]:
        return self.source.captions_reader(self.packing), self.source.samples_table()

    def new_bytes(self) -> int:
        return min(super().new_bytes(), self.request.budget or sys.maxsize)

    def prepare(self, store: FeatureStore) -> FeatureStore:
        if self.request.budget is None and store.has_budget:
            leave_budget(store)
        return store

    def fill(
        self,
        store: FeatureStore,
        executor: Executor,
        report: Callable[[str], None],
        progress: Style,
    ) -> None:
        if self.request.budget is None:
            super().fill(store, executor, report, progress)
            return
        from .budget import follow_runs

        report(f"{self.describe()}; shards: {self.packing.layout.num_shards}, {executor}")
        follow_runs(self, store, self.followed, self.request.budget, executor, report, progress)

    def describe(self) -> str:
        identity = self.manifest.identity
        return (
            f"{len(self.source.samples):,} samples, {len(self.source.captions):,} unique captions, "
            f"{self.packing.layout.num_rows:,} tokens x {len(identity.layers)} layers x "
            f"{identity.model.width}: {format_bytes(self.uncompressed_bytes())}"
        )

    def task(self, shard: int) -> tuple[Job, ShardTask]:
        entries = self.packing.entries(shard)
        chosen = slice(entries.start, entries.stop)
        row_start = self.packing.row_start[chosen] - shard * self.packing.layout.rows_per_shard
        return self.job, ShardTask.of(self.source.captions, chosen, shard, row_start)

    def _settle_batching(self, executor: Executor, report: Callable[[str], None]) -> "FeaturePlan":
        executor.limit(self.packing.layout.num_shards)
        reason = _ask(try_packing, self.job, self.source, executor)
        if reason and self.request.batching == "packed":
            raise InputError(f"--batching packed: {reason}; take auto or padded")
        if reason:
            report(f"batches are padded: {reason}")
            return self
        layout = self.manifest.layout.model_copy(update={"line_tokens": LINE_TOKENS})
        return replace(self, manifest=self.manifest.model_copy(update={"layout": layout}))

    def _settle_codec(self, executor: Executor, report: Callable[[str], None]) -> "FeaturePlan":
        fitted = _fit(self.job, self.manifest, self.source.captions, executor, report)
        return replace(
            self,
            manifest=self.manifest.model_copy(update={"codec": fitted.spec}),
            parameters=fitted.parameters,
            bits_per_value=fitted.bits_per_value,
        )


def plan_features(
    request: ExtractRequest, existing: FeatureStore | None, workers: Workers
) -> FeaturePlan:
    """Plan an extraction: everything but the two questions to a worker.

    Args:
        existing: the store to resume or append to.

    Raises:
        InputError: bad input; or ``existing`` was not made from the first rows of the source.
    """
    from .budget import read_runs

    followed = read_runs(request)
    before = existing.manifest if existing is not None else None
    dtype, threads, batch_tokens = request.dtype, request.threads, request.batch_tokens
    spec = request_codec(request.codec, request.quality, request.rank)
    line_tokens = None
    if dtype == "auto":
        dtype = "bfloat16" if workers.have_gpus else "float32"
        dtype = before.identity.dtype if before is not None else dtype
    source = make_plan(request.model_copy(update={"dtype": dtype}), before)
    codec = None if before is None else before.codec
    spec = settle_rank(spec, source.identity.model.width)
    exact = choose_exact_layers(request.exact_layers, spec.name, source.identity, codec)
    spec = fitted_before(with_exact_layers(spec, exact), codec)
    if existing is not None and before is not None:
        check_rows(existing, source.samples, source.earlier)
        threads = before.layout.num_threads
        batch_tokens = batch_tokens or before.layout.batch_tokens
        line_tokens = before.layout.line_tokens if request.batching != "padded" else None
        if request.batching == "packed" and not line_tokens:
            raise InputError(
                f"--batching packed: {existing.path} was begun with padded ones; take auto or "
                "padded"
            )
    captions = source.captions
    packing = pack(
        captions.num_tokens,
        bytes_per_row=2 * len(source.identity.layers) * source.identity.model.width,
        shard_bytes=request.shard_bytes,
        batch_tokens=batch_tokens or default_batch_tokens(workers.have_gpus),
        rows_per_chunk=None if before is None else before.layout.rows_per_chunk,
        aligned=CODECS[request.codec].aligned,
        num_threads=threads or workers.threads,
        earlier=[earlier.num_captions for earlier in captions.earlier],
    )
    manifest = FeatureManifest(
        status="extracting",
        identity=source.identity,
        layout=packing.layout.model_copy(update={"line_tokens": line_tokens}),
        codec=spec,
        provenance=provenance(request.source, source.model.name),
        grown_from=generations(captions.earlier, source.earlier, packing, existing),
    )
    return FeaturePlan(
        path=request.target,
        existing=existing,
        manifest=manifest,
        packing=packing,
        followed=followed,
        request=request,
        source=source,
    )


def _some(captions: Captions, chosen: slice) -> ShardTask:
    """A task of some captions that belongs to no shard."""
    counts = captions.num_tokens[chosen]
    return ShardTask.of(captions, chosen, 0, np.cumsum(counts) - counts)


def _ask(
    question: Callable[[Job, ShardTask, FeatureIdentity], str],
    job: Job,
    source: Plan,
    executor: Executor,
) -> str:
    """Ask a worker about some captions: whether they can be packed, or only whether the LLM runs.

    Raises:
        InputError: it does not.
    """
    captions = source.captions
    chosen = slice(min(1, len(captions) - 1), 1 + NUM_CAPTIONS)  # the null caption is short
    task = _some(captions, chosen)
    outcomes = executor.run(
        [0], question, lambda _: (job, task, source.identity), on_progress=lambda *_: None
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
    with progress_bar(total=num, unit=" captions", desc=f"fit {name}") as bar:

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
