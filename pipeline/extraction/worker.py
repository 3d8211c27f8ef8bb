"""The tasks of an extraction: encode a shard, or a sample of captions to which a codec is fitted.

They run in workers. Batches are fixed by the plan, so that encoding a shard again gives the same
bytes.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ...schemas import Codec, FeatureIdentity, FeatureManifest, Layout, Receipt
from ...schemas.memory import is_out_of_memory
from ..codecs import base as codecs
from ..codecs.base import allocate
from ..codecs.error import CodecError, layer_errors
from ..codecs.fit import fit_codec, fitted_spec
from ..executor.base import Deferred, report_progress, worker_name
from ..executor.workers import own_device
from ..models.packing import NUM_CAPTIONS, check_packing, supports_packing
from ..store.features import FeatureStore
from ..store.layout import rows_of
from ..text.batching import Batch, batches
from ..text.captions import Captions, StoredRows
from ..text.tokenization import RaggedTokens

if TYPE_CHECKING:
    import torch

    from ..models.hub import ModelFiles
    from ..models.llm import Encoder


SINK_RATIO = 20.0
"""A first kept token whose norm is this many times that of the others, in any layer, is the LLM's
attention sink: its meaning is lost (on SmolLM2 without BOS the ratio exceeds 100)."""
HALVED = (
    "batches did not fit into memory and were run in halves: smaller --batch-tokens would be "
    "faster. In the last bit the result may differ from that of whole batches"
)
_model_in_use = threading.Lock()
"""A model serves one task at a time, however many threads a worker was given."""


@dataclass(frozen=True)
class Job:
    """The part of a task that is the same for every shard of an extraction."""

    store: Path
    source: "ModelFiles"


@dataclass(frozen=True)
class ShardTask:
    """The captions of one shard; rows are counted from the shard's start."""

    shard: int
    texts: list[str]
    sequences: RaggedTokens
    stored: StoredRows
    row_start: np.ndarray
    has_null: bool
    max_bytes: int | None = None
    """Bytes that its files may take."""

    @cached_property
    def num_rows(self) -> np.ndarray:
        """Rows of each caption, int64 ``[captions]``."""
        return self.stored.counts

    @classmethod
    def of(
        cls, captions: Captions, chosen: slice, shard: int, row_start: np.ndarray
    ) -> "ShardTask":
        return cls(
            shard=shard,
            texts=captions.texts[chosen].to_pylist(),
            sequences=captions.sequences[chosen],
            stored=captions.rows[chosen],
            row_start=row_start,
            has_null=chosen.start == 0,
        )


@dataclass(frozen=True)
class Fitted:
    """A codec fitted to a sample."""

    spec: Codec
    parameters: dict[str, np.ndarray]
    bits_per_value: float
    warnings: list[str]


def encode_shard(job: Job, task: ShardTask) -> Deferred[Receipt]:
    """Encode one shard, then write it and its receipt. Runs in a worker."""
    store = FeatureStore.open(job.store, complete=False)
    with _naming_culprit(store, job.source, task), _model_in_use:
        shard, last = _encode(store, job.source, task)

    def write() -> Receipt:
        with _naming_culprit(store, job.source, task):
            shard.keep(last)
        return store.complete_shard(shard.arrays, shard.receipt(), task.max_bytes)

    return Deferred(write)


class NotFiniteError(ValueError):
    """Hidden states that are NaN or infinite.

    Attributes:
        entries: positions in the task of all captions of a batch that have some, in its order.
    """

    def __init__(self, message: str, entries: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.entries = entries

    @classmethod
    def of(cls, layer: int, task: ShardTask, rows: np.ndarray) -> "NotFiniteError":
        found = np.searchsorted(task.row_start, rows, side="right") - 1
        entries = [*dict.fromkeys(found.tolist())]
        return cls(
            f"hidden states of layer {layer} are not finite for the caption "
            f"{task.texts[entries[0]]!r}; with --dtype bfloat16 try float32",
            entries,
        )


@dataclass(frozen=True)
class _Part:
    """Coded layers of a batch, or of a half of one.

    Attributes:
        rows: rows of the shard, int64 ``[R]``.
        layers: per layer, its arrays by name ``[R, ...]``, on the CPU or on their way there.
        done: event of the device after which they have arrived.
    """

    rows: np.ndarray
    layers: "list[dict[str, torch.Tensor]]"
    done: "torch.Event | None"

    def wait(self) -> None:
        if self.done is not None:
            self.done.synchronize()


class _Shard:
    """A shard being filled with codes.

    Attributes:
        arrays: codes by name, ``[rows_per_shard, L, size]``.
        seconds: time spent per step.
        warnings: conditions met on the way, one line each.
    """

    def __init__(self, store: FeatureStore, task: ShardTask) -> None:
        layout, self._layers = store.manifest.layout, store.manifest.identity.layers
        shape = (layout.rows_per_shard, len(self._layers))
        rows = rows_of(task.row_start, task.num_rows)
        self._codec = _codec_of(store)
        self.arrays = allocate(self._codec.arrays, *shape, rows)
        self.seconds = {"load": 0.0, "forward": 0.0, "code": 0.0}
        self.warnings: list[str] = []
        self._task, self._template = task, store.manifest.identity.template
        self._norms = np.zeros(shape[::-1], np.float32)
        self._error = CodecError(self._layers)
        self._below: codecs.Coded | None = None

    def code(self, index: int, hidden: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Code a layer (position) of a batch on its device."""
        import torch

        with self._timed("code"):
            coded = self._codec.encode(index, hidden, self._below if index else None)
            relative, bare = layer_errors(hidden, coded.hidden)
            norm = torch.linalg.vector_norm(hidden.float(), dim=-1)
            self._below = coded
        return {"norm": norm, "relative": relative, "bare": bare, **coded.codes}

    def keep(self, part: _Part) -> None:
        """Store the codes of a batch in their rows.

        Raises:
            NotFiniteError: with the caption and the layer.
        """
        with self._timed("forward"):  # a device's work on the LLM and codes is one
            part.wait()
        with self._timed("code"):
            for index, found in enumerate(part.layers):
                norms = self._norms[index, part.rows] = found.pop("norm").numpy()
                bad = part.rows[~np.isfinite(norms)]
                if len(bad):
                    raise NotFiniteError.of(self._layers[index], self._task, bad)
                self._error.add_errors(index, found.pop("relative"), found.pop("bare"))
                codecs.insert(self.arrays, self._codec.arrays, index, part.rows, found)

    def receipt(self) -> Receipt:
        """The receipt, without what is known only once the shard is written."""
        task = self._task
        return Receipt(
            shard=task.shard,
            num_rows=int(task.num_rows.sum()),
            num_entries=len(task.texts),
            files={},
            codec_error=self._error.to_dict(),
            layer_error=self._error.by_layer(),
            warnings=[*self.warnings, *self._sink_warnings()],
            seconds=self.seconds,
            worker=worker_name(),
        )

    def _sink_warnings(self) -> list[str]:
        """Warnings about attention sinks, where nobody chose rows as a pipeline reads them."""
        if self._template.processing is not None:
            return []
        return _sink_warnings(self._norms, self._layers, self._task)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def _codec_of(store: FeatureStore) -> codecs.Codec:
    identity = store.manifest.identity
    shape = (len(identity.layers), identity.model.width)
    return _read_codec(store.path, store.manifest.codec, *shape)


@lru_cache(maxsize=1)
def _read_codec(store: Path, *_described: Codec | int) -> codecs.Codec:
    """The codec, read once per worker: parameters are one file per layer, and go to the device.

    Args:
        _described: what a store of this path that is made anew may have otherwise; of parameters
            their digest.
    """
    return FeatureStore.open(store, complete=False).codec


def _encode(store: FeatureStore, source: "ModelFiles", task: ShardTask) -> tuple[_Shard, _Part]:
    """A shard, and its last part, still to be stored: the LLM is free already."""
    import torch

    manifest = store.manifest
    started = time.perf_counter()
    torch.set_num_threads(manifest.layout.num_threads)
    encoder = encoder_of(source, manifest.identity)
    if manifest.layout.line_tokens is not None:
        _try_once(encoder, task)
    loaded = time.perf_counter()
    shard = _Shard(store, task)
    parts = _run(encoder, task, manifest.layout, shard.code, shard.warnings)
    last = next(parts)
    for part in parts:
        shard.keep(last)  # while a device is at work on the next
        last = part
    shard.seconds["forward"] = time.perf_counter() - loaded - shard.seconds["code"]
    shard.seconds["load"] = loaded - started
    return shard, last


@contextmanager
def _naming_culprit(store: FeatureStore, source: "ModelFiles", task: ShardTask) -> Iterator[None]:
    """Re-raise for the single caption in a packed row that is not finite."""
    try:
        yield
    except NotFiniteError as error:
        if store.manifest.layout.line_tokens is None:
            raise
        with _model_in_use:
            raise _find_culprit(store, source, task, error) from error


def _find_culprit(
    store: FeatureStore, source: "ModelFiles", task: ShardTask, error: NotFiniteError
) -> NotFiniteError:
    """Find the caption of a packed row that is not finite. All its neighbours are NaN too: values
    with no weight in attention are multiplied by zero, and NaN stays NaN."""
    layers = store.manifest.identity.layers
    encoder = encoder_of(source, store.manifest.identity)
    found: list[tuple[int, np.ndarray]] = []

    def take(index: int, hidden: "torch.Tensor") -> None:
        bad = ~hidden.isfinite().all(-1).cpu().numpy()
        found.append((layers[index], start + np.flatnonzero(bad)))

    for entry in error.entries:
        start = task.row_start[entry]
        encoder.encode([task.sequences[entry]], task.stored.of([entry]), take)
        for layer, rows in found:
            if len(rows):
                return NotFiniteError.of(layer, task, rows)
    return error


_tried: "weakref.WeakSet[Encoder]" = weakref.WeakSet()


def _try_once(encoder: "Encoder", task: ShardTask) -> None:
    """Check packing once per worker: its device may have other kernels than the first one."""
    if encoder not in _tried:
        check_packing(encoder, list(task.sequences[:NUM_CAPTIONS]))
        _tried.add(encoder)


def encoder_of(source: "ModelFiles", identity: FeatureIdentity) -> "Encoder":
    """The LLM of a store, loaded once per process."""
    return _load_encoder(source, tuple(identity.layers), identity.dtype, own_device())


@lru_cache(maxsize=1)
def _load_encoder(
    source: "ModelFiles",
    layers: tuple[int, ...],
    dtype: Literal["float32", "bfloat16"],
    device: str,
) -> "Encoder":
    from transformers.utils import logging

    from ..models.llm import Encoder

    logging.disable_progress_bar()
    return Encoder(source, layers, dtype, device)


def _run(
    encoder: "Encoder",
    task: ShardTask,
    layout: Layout,
    code: "Callable[[int, torch.Tensor], dict[str, torch.Tensor]]",
    warnings: list[str],
) -> Iterator[_Part]:
    """Run a task's captions through the LLM.

    A batch that does not fit into memory is run in halves; its layers so far are discarded.

    Args:
        code: codes a layer (by position) of a batch, ``[R, H]``, on its device.
        warnings: gets one line if a batch was halved.
    """
    import torch

    lengths = task.sequences.lengths

    def run(batch: Batch) -> Iterator[_Part]:
        entries = batch.entries
        rows = rows_of(task.row_start[entries], task.num_rows[entries])
        layers: list[dict[str, torch.Tensor]] = []
        done = None

        def take(index: int, hidden: "torch.Tensor") -> None:
            # A device goes on with the next layer while these are on their way.
            found = code(index, hidden)
            layers.append({k: v.to("cpu", non_blocking=True) for k, v in found.items()})

        try:
            sequences = [task.sequences[i] for i in entries]
            encoder.encode(sequences, task.stored.of(entries), take, batch.row)
            if encoder.device.type != "cpu":
                done = torch.accelerator.current_stream(encoder.device).record_event()
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        else:
            yield _Part(rows, layers, done)
            return
        # Not within except: the error's traceback holds on to the activations.
        layers.clear()
        _free_memory()
        warnings[:] = [HALVED]
        for half in batch.halves():
            yield from run(half)

    num = 0
    for batch in batches(lengths, layout.batch_tokens, layout.line_tokens):
        yield from run(batch)
        num += len(batch)
        report_progress(task.shard, num)


def _free_memory() -> None:
    """Release the memory of a batch that did not fit, which the allocator holds in fragments."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def try_llm(job: Job, task: ShardTask, identity: FeatureIdentity) -> str:
    """Load the LLM and run a caption, so that what is wrong with it is known at once; ""."""
    with _model_in_use:
        encoder = encoder_of(job.source, identity)
        encoder.encode([task.sequences[0]], task.stored.of([0]), lambda *_: None)
        return ""


def try_packing(job: Job, task: ShardTask, identity: FeatureIdentity) -> str:
    """The reason why captions cannot be packed into one row of a batch, or "". Runs in a worker."""
    with _model_in_use:
        encoder = encoder_of(job.source, identity)
        try:
            apart = supports_packing(encoder, list(task.sequences))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "rows of three captions do not fit into memory"
        if not apart:
            return "the LLM does not keep captions apart that are packed into one row"
        _tried.add(encoder)
        return ""


def fit_sample(job: Job, task: ShardTask, manifest: FeatureManifest) -> Fitted:
    """Encode a sample and fit the codec to it. Runs in a worker."""
    with _model_in_use:
        return _fit_to(job, task, manifest)


def _fit_to(job: Job, task: ShardTask, manifest: FeatureManifest) -> Fitted:
    import torch

    torch.set_num_threads(manifest.layout.num_threads)
    identity = manifest.identity
    encoder = encoder_of(job.source, identity)
    num_rows = int(task.num_rows.sum())
    shape = (num_rows, len(identity.layers), identity.model.width)
    sample = torch.empty(shape, dtype=getattr(torch, identity.dtype))

    def code(index: int, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": hidden, "norm": torch.linalg.vector_norm(hidden.float(), dim=-1)}

    def gather(layout: Layout) -> tuple[np.ndarray, NotFiniteError | None]:
        """Mask of finite rows, and the error for the first caption with others."""
        finite, first = np.ones(num_rows, bool), None
        for part in _run(encoder, task, layout, code, warnings):
            part.wait()
            rows = torch.from_numpy(part.rows)
            for index, found in enumerate(part.layers):
                there = np.isfinite(found["norm"].numpy())
                finite[part.rows] &= there
                if first is None and not there.all():
                    first = NotFiniteError.of(identity.layers[index], task, part.rows[~there])
                sample[rows, index] = found["hidden"]
        return finite, first

    warnings: list[str] = []
    finite, first = gather(manifest.layout)
    if first is not None and manifest.layout.line_tokens is not None:
        finite, first = gather(manifest.layout.model_copy(update={"line_tokens": None}))
    if first is not None:
        sample = sample[torch.from_numpy(finite)]
        if not len(sample):
            raise first
        warnings.append(
            f"{num_rows - len(sample):,} of {num_rows:,} tokens are left out of what the codec is "
            f"fitted to: {first}"
        )
    codec, bits_per_value = fit_codec(manifest.codec, sample, identity.layers)
    spec = fitted_spec(manifest.codec, codec, len(task.texts), len(sample))
    return Fitted(spec, dict(codec.parameters), bits_per_value, warnings)


def _sink_warnings(norms: np.ndarray, layers: Sequence[int], task: ShardTask) -> list[str]:
    """A warning if first kept tokens look like attention sinks."""
    counts = task.num_rows
    eligible = counts > 1
    eligible[0] &= not task.has_null
    if not eligible.any():
        return []
    first = task.row_start[eligible]
    others = rows_of(first + 1, counts[eligible] - 1)
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
