"""Captions -> conditioning store: what a pipeline gives its transformer, by its own code.

Rows of every caption are known before the text encoders run: the pipeline's own code counts its
tokens. One question is asked of a worker first, the shapes of the tensors.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ...schemas import (
    CONDITIONING_CAPTIONS_SCHEMA,
    MASK,
    ConditioningIdentity,
    ConditioningManifest,
    ConditioningTensor,
    InputError,
    Receipt,
    parse,
)
from ...schemas.files import locate
from ...schemas.units import format_bytes
from ...schemas.verbosity import progress_bar
from ..codecs.chunks import choose_rows_per_chunk
from ..executor.base import Deferred, Executor, report_progress, worker_name
from ..executor.progress import Style
from ..executor.workers import Workers, own_device
from ..models.limits import Limits, refuse_beyond
from ..sources.table import SampleTable, read_samples
from ..store.conditioning import ConditioningStore, row_bytes, stored_dtype
from ..store.layout import Packing, pack
from ..text.captions import deduplicate, identify
from ..text.tokenization import BAR_SECONDS, RaggedTokens
from .append import check_rows, generations
from .driver import StorePlan, provenance, write_store
from .plan import samples_table
from .requests import ConditioningRequest

if TYPE_CHECKING:
    from ..models.hub import ModelFiles
    from ..models.llm import Dtype
    from ..models.text_pipelines import TextPipeline

PROGRESS = 16
"""Captions between two progress reports."""
CHUNK_BYTES = 16_384
"""Smaller chunks of whole captions would only make a shard's index longer."""
_in_use = threading.Lock()
"""A pipeline serves one task at a time, however many threads a worker was given."""


def encode_captions(
    source: str,
    conditioning: str | Path,
    *,
    report: Callable[[str], None] = print,
    progress: Style = "auto",
    **options: Any,
) -> ConditioningStore:
    """Run the text encoders of a pipeline over captions once, and store what they give exactly.

    Called again with the same arguments it resumes where it was stopped. Called with a source that
    gained rows at its end, it adds new shards to the store and leaves the old ones.

    Args:
        source, conditioning, options: the fields of
            :class:`semroute.pipeline.extraction.requests.ConditioningRequest`; ``conditioning`` is
            its target.
        report, progress: as in :func:`semroute.pipeline.extraction.extract`.

    Raises:
        InputError: bad input, before any work; no such pipeline, or one of an unknown class.
        ExtractionError, Interrupted: as in :func:`extract`.
    """
    request = parse(
        ConditioningRequest,
        {"source": source, "target": locate(conditioning), **options},
        "the conditioning",
    )

    def plan(existing: ConditioningStore | None, workers: Workers) -> ConditioningPlan:
        return plan_conditioning(request, existing, workers, report)

    return write_store(ConditioningStore, plan, request, report, progress)


@dataclass(frozen=True, kw_only=True)
class ConditioningPlan(StorePlan[ConditioningStore]):
    """A conditioning store to be made.

    Attributes:
        request: what was asked for.
        pipeline: where it is.
        samples: the user's table.
        texts: unique captions in store order, large_string.
        caption_ids: ``list<int64>``, the captions of each sample.
        tokens: token ids of each caption's own rows.
    """

    unit = "captions"

    manifest: ConditioningManifest
    request: ConditioningRequest
    pipeline: "ModelFiles"
    samples: SampleTable
    texts: pa.Array
    caption_ids: pa.ListArray
    tokens: list[np.ndarray]

    def settle(self, executor: Executor, report: Callable[[str], None]) -> "ConditioningPlan":
        """Ask a worker for the shapes of the tensors, which decide the layout."""
        if self.existing is not None:
            return self
        identity = self.manifest.identity
        outcomes = executor.run(
            [0],
            describe_tensors,
            lambda _: (self.pipeline, identity.dtype, identity.ragged),
            on_progress=lambda *_: None,
        )
        ((_, found),) = outcomes
        if isinstance(found, BaseException):
            raise InputError(f"the pipeline could not be tried: {found}") from found
        identity = identity.model_copy(update={"tensors": found})
        packing = _pack(identity, self.tokens, self.request, self.manifest.layout.num_threads, [])
        update = {"identity": identity, "layout": packing.layout}
        return replace(self, packing=packing, manifest=self.manifest.model_copy(update=update))

    def tables(self) -> dict[str, pa.Table]:
        starts = self.packing.row_start
        offsets = np.cumsum([0, *map(len, self.tokens)])
        tokens = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.array(np.concatenate(self.tokens), pa.int32())
        )
        columns = [
            np.arange(len(self.texts)),
            self.texts.cast(pa.string()),
            tokens,
            self.packing.shard,
            starts,
            starts + self.packing.num_rows,
        ]
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, CONDITIONING_CAPTIONS_SCHEMA, strict=True)
        ]
        return {
            "captions": pa.table(arrays, schema=CONDITIONING_CAPTIONS_SCHEMA),
            "samples": samples_table(self.samples, self.caption_ids),
        }

    def _bytes(self, first: int = 0) -> int:
        """Uncompressed bytes of the captions from the given one on."""
        rows = int(self.packing.num_rows[first:].sum())
        return rows * sum(map(row_bytes, self.manifest.identity.tensors))

    def new_bytes(self) -> int:
        return self._bytes(0 if self.existing is None else len(self.existing))

    def create(self) -> ConditioningStore:
        tables = self.tables()
        return ConditioningStore.create(
            self.path, self.manifest, tables["captions"], tables["samples"]
        )

    def describe(self) -> str:
        rows = f"{self.packing.layout.num_rows:,} rows"
        return (
            f"{len(self.samples):,} samples, {len(self.texts):,} unique captions, {rows} of "
            f"{self.manifest.identity.pipeline}: {format_bytes(self._bytes())}"
        )

    def task(self, shard: int) -> "tuple[_Task]":
        entries = self.packing.entries(shard)
        chosen = slice(entries.start, entries.stop)
        starts = self.packing.row_start[chosen] - shard * self.packing.layout.rows_per_shard
        return (
            _Task(
                store=self.path.resolve(),
                pipeline=self.pipeline,
                shard=shard,
                ids=[*entries],
                texts=self.texts[chosen].to_pylist(),
                row_start=starts,
                num_rows=self.packing.num_rows[chosen],
            ),
        )

    @staticmethod
    def function(*task: Any) -> Deferred[Receipt]:
        return _encode_captions(*task)


def plan_conditioning(
    request: ConditioningRequest,
    existing: ConditioningStore | None,
    workers: Workers,
    report: Callable[[str], None],
) -> ConditioningPlan:
    """Plan a conditioning store: all but the shapes of its tensors.

    Args:
        existing: the store to resume or append to.

    Raises:
        InputError: bad input; or ``existing`` was not made from the first rows of the source.
    """
    from ..models.text_pipelines import TextPipeline, find_text_pipeline

    before = None if existing is None else existing.manifest
    dtype = request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if workers.have_gpus else "float32"
        dtype = before.identity.dtype if before is not None else dtype
    text = TextPipeline(find_text_pipeline(request.pipeline), dtype=dtype)
    samples = read_samples(request.source, **request.text_options, limit=request.limit, need="text")
    report(samples.describe())
    counts = [] if before is None else [g.samples.num_samples for g in before.generations]
    earlier = [count for count in counts if count < len(samples)]
    identities = [samples.slice(0, count).identity() for count in earlier]
    if existing is not None:
        check_rows(existing, samples, identities)
    unique = deduplicate(samples.texts(), request.seed, earlier)
    tokens = _count(text, unique.texts)
    refuse_beyond(
        f"{text.source.name}/{text.recipe.encoder}",
        Limits("the LLM", text.num_known_tokens),
        RaggedTokens(np.concatenate(tokens), np.cumsum([0, *map(len, tokens)])),
        unique.texts,
        text.tokenizer,
    )
    recipe = text.recipe
    identity = ConditioningIdentity(
        pipeline=recipe.pipeline,
        files=text.source.files,
        cleaners=[package for package in recipe.cleaners if find_spec(package)],
        dtype=dtype,
        max_length=text.max_length,
        layers=text.base_layers,
        rows=recipe.rows,
        ragged=not recipe.reads_padding,
        tensors=_UNKNOWN if before is None else before.identity.tensors,
        captions=identify(unique.texts, request.seed),
        samples=samples.identity(),
    )
    threads = request.threads or workers.threads
    if before is not None:
        threads = before.layout.num_threads
    packing = _pack(identity, tokens, request, threads, unique.ends[:-1])
    captions = [identify(unique.texts.slice(0, end), request.seed) for end in unique.ends[:-1]]
    manifest = ConditioningManifest(
        status="extracting",
        identity=identity,
        layout=packing.layout,
        provenance=provenance(request.source, text.source.name),
        grown_from=generations(captions, identities, packing, existing),
    )
    return ConditioningPlan(
        path=request.target,
        existing=existing,
        manifest=manifest,
        packing=packing,
        request=request,
        pipeline=text.source,
        samples=samples,
        texts=unique.texts,
        caption_ids=unique.caption_ids,
        tokens=tokens,
    )


_UNKNOWN = [ConditioningTensor(name="unknown", shape=[1], dtype="uint8")]
"""Tensors of a store until a worker has told their shapes."""


def _count(text: "TextPipeline", texts: pa.Array) -> list[np.ndarray]:
    """Token ids of each caption's own rows, int32."""
    bar = progress_bar(texts.to_pylist(), unit=" captions", desc="tokenise", delay=BAR_SECONDS)
    return [text.tokens(each).astype(np.int32) for each in bar]


def _pack(
    identity: ConditioningIdentity,
    tokens: Sequence[np.ndarray],
    request: ConditioningRequest,
    num_threads: int,
    earlier: Sequence[int],
) -> Packing:
    """Captions assigned to shards: a row per token if the store is ragged, else one per caption."""
    bytes_per_row = sum(map(row_bytes, identity.tensors))
    lengths = np.array([*map(len, tokens)], np.int64)
    return pack(
        lengths if identity.ragged else np.ones_like(lengths),
        bytes_per_row=bytes_per_row,
        shard_bytes=request.shard_bytes,
        batch_tokens=1,
        rows_per_chunk=(
            choose_rows_per_chunk(bytes_per_row)
            if identity.ragged
            else max(1, CHUNK_BYTES // bytes_per_row)
        ),
        num_threads=num_threads,
        earlier=earlier,
    )


@dataclass(frozen=True)
class _Task:
    """One shard of captions to encode; rows are counted from the shard's start."""

    store: Path
    pipeline: "ModelFiles"
    shard: int
    ids: list[int]
    texts: list[str]
    row_start: np.ndarray
    num_rows: np.ndarray


def describe_tensors(
    pipeline: "ModelFiles", dtype: "Dtype", ragged: bool
) -> list[ConditioningTensor]:
    """Tensors that a pipeline gives its transformer for a caption, by trying. Runs in a worker."""
    with _in_use:
        values = _encode(_load(pipeline, dtype, own_device()), "", ragged)
    return [
        ConditioningTensor(
            name=name, shape=[*value.shape[ragged:]], dtype=str(value.dtype).removeprefix("torch.")
        )
        for name, value in values.items()
    ]


def _encode_captions(task: _Task) -> Deferred[Receipt]:
    """Encode one shard of captions, then write it and its receipt. Runs in a worker."""
    import torch

    started = time.perf_counter()
    store = ConditioningStore.open(task.store, complete=False)
    layout, identity = store.manifest.layout, store.manifest.identity
    tensors = {tensor.name: tensor for tensor in identity.tensors}
    arrays = {
        name: np.zeros((layout.rows_per_shard, *tensor.shape), stored_dtype(tensor))
        for name, tensor in tensors.items()
    }
    with _in_use:
        torch.set_num_threads(layout.num_threads)
        pipeline = _load(task.pipeline, identity.dtype, own_device())
        loaded = time.perf_counter()
        spans = zip(task.texts, task.row_start.tolist(), task.num_rows.tolist(), strict=True)
        for number, (text, start, num) in enumerate(spans, 1):
            for name, value in _encode(pipeline, text, identity.ragged).items():
                rows = value if identity.ragged else value[None]
                _check(rows, (num, *tensors[name].shape), name, text)
                bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
                arrays[name][start : start + num] = bits.numpy()
            if number % PROGRESS == 0:
                report_progress(task.shard, number)
    receipt = Receipt(
        shard=task.shard,
        num_rows=int(task.num_rows.sum()),
        num_entries=len(task.ids),
        files={},
        codec_error={},
        warnings=[],
        seconds={"load": loaded - started, "encode": time.perf_counter() - loaded},
        worker=worker_name(),
    )
    return Deferred(lambda: store.complete_shard(arrays, receipt))


def _encode(pipeline: "TextPipeline", text: str, ragged: bool) -> dict[str, Any]:
    """A caption's tensors on the CPU; the mask as uint8, and only where there is padding."""
    import torch

    values = pipeline.encode_one(text)
    mask = values.pop(MASK)
    if not ragged:
        values[MASK] = mask.to(torch.uint8)
    return {name: value.cpu().contiguous() for name, value in values.items()}


def _check(rows: Any, shape: tuple[int, ...], name: str, text: str) -> None:
    """Refuse a caption's tensor that is not as planned, or not finite."""
    if tuple(rows.shape) != shape:
        raise InputError(
            f"{name} of the caption {text!r} is {tuple(rows.shape)}; expected {shape} from its "
            "tokens"
        )
    if not rows.isfinite().all():
        raise InputError(f"{name} of the caption {text!r} is not finite; try --dtype float32")


@lru_cache(maxsize=1)
def _load(source: "ModelFiles", dtype: "Dtype", device: str) -> "TextPipeline":
    """The text half of the pipeline, loaded once per worker."""
    from ..models.text_pipelines import TextPipeline

    return TextPipeline(source, device, dtype)
