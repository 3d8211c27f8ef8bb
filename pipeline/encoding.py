"""The tasks of an extraction: encode a shard, or a sample of captions to which a codec is fitted.

They run in workers. Batches are fixed by the plan, so that encoding a shard again gives the same
bytes.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..schemas import Codec, FeatureManifest, Receipt
from .captions import Captions
from .cluster import let_next_begin, report_progress, worker_name
from .codecs import Coded
from .distortion import CodecError, layer_errors
from .fitting import fit_codec, fitted_spec
from .layout import batches
from .places import own_device
from .store import FeatureStore
from .tokens import Sequences

if TYPE_CHECKING:
    import torch

    from .encoder import Encoder, Source

SINK_RATIO = 20.0
"""A first kept token whose norm is this many times that of the others, in any layer, is the LLM's
attention sink: its meaning is lost (on SmolLM2 without BOS the ratio exceeds 100)."""
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
"""What torch says of it on a CPU, where it is a plain RuntimeError, and on devices of others."""
HALVED = (
    "batches did not fit into memory and were run in halves: smaller --batch-tokens would be "
    "faster. In the last bit the result may differ from that of whole batches"
)
_model_in_use = threading.Lock()
"""A model serves one task at a time, however many threads a worker was given."""


@dataclass(frozen=True)
class Job:
    """What every task of an extraction shares."""

    store: Path
    source: "Source"


@dataclass(frozen=True)
class Task:
    """The captions of one shard; rows count from the shard's start."""

    shard: int
    texts: list[str]
    sequences: Sequences
    kept: np.ndarray
    row_start: np.ndarray
    has_null: bool

    @classmethod
    def of(cls, captions: Captions, chosen: slice, shard: int, row_start: np.ndarray) -> "Task":
        return cls(
            shard=shard,
            texts=captions.texts[chosen].to_pylist(),
            sequences=captions.sequences[chosen],
            kept=captions.kept[chosen],
            row_start=row_start,
            has_null=chosen.start == 0,
        )


@dataclass(frozen=True)
class Fitted:
    """What fitting a codec gave."""

    spec: Codec
    parameters: dict[str, np.ndarray]
    bits_per_value: float
    warnings: list[str]


def encode_shard(job: Job, task: Task) -> Receipt:
    """Encode and write one shard, then its receipt. Runs in a worker."""
    store = FeatureStore.open(job.store, complete=False)
    with _model_in_use:
        planes, receipt = _encode(store, job.source, task)
    let_next_begin()
    return store.complete_shard(planes, receipt)


def _encode(
    store: FeatureStore, source: "Source", task: Task
) -> tuple[dict[str, np.ndarray], Receipt]:
    """The codes of a shard, and its receipt but for what is known when they are written."""
    import torch

    started = time.perf_counter()
    manifest = store.manifest
    torch.set_num_threads(manifest.layout.num_threads)
    layers = manifest.identity.layers
    encoder = _load_encoder(source, tuple(layers), manifest.identity.dtype, own_device())
    loaded = time.perf_counter()
    codec = store.codec
    planes = {
        plane.name: np.zeros((manifest.layout.rows_per_shard, len(layers), plane.size), plane.dtype)
        for plane in codec.planes
    }
    norms = np.zeros((len(layers), manifest.layout.rows_per_shard), np.float32)
    error = CodecError(layers)
    coded: Coded | None = None
    waiting: list[tuple[int, np.ndarray, dict[str, torch.Tensor]]] = []

    def sink(index: int, hidden: "torch.Tensor", rows: np.ndarray) -> None:
        nonlocal coded
        coded = codec.encode(index, hidden, coded if index else None)
        relative, bare = layer_errors(hidden, coded.hidden)
        norm = torch.linalg.vector_norm(hidden.float(), dim=-1)
        found = {"norm": norm, "relative": relative, "bare": bare, **coded.planes}
        # A device goes on with the next layer while these are on their way.
        waiting.append((index, rows, {k: v.to("cpu", non_blocking=True) for k, v in found.items()}))

    @contextmanager
    def attempt() -> Iterator[None]:
        """Keep what a batch gave once all of it is there; of one that fails nothing is kept."""
        waiting.clear()
        yield
        if encoder.device.type != "cpu":
            torch.accelerator.synchronize()
        for index, rows, found in waiting:
            norms[index, rows] = found.pop("norm").numpy()
            _check_finite(norms[index, rows], rows, layers[index], task)
            error.add_errors(index, found.pop("relative"), found.pop("bare"))
            for name, codes in found.items():
                planes[name][rows, index] = codes.numpy()
        waiting.clear()

    warnings = _encode_batches(encoder, task, manifest.layout.batch_tokens, sink, attempt)
    receipt = Receipt(
        shard=task.shard,
        num_rows=len(task.sequences.tokens) - int(task.kept.sum()),
        num_entries=len(task.texts),
        files={},
        codec_error=error.to_dict(),
        layer_error=error.by_layer(),
        warnings=[*warnings, *_sink_warnings(norms, layers, task)],
        seconds={"load": loaded - started, "encode": time.perf_counter() - loaded},
        worker=worker_name(),
    )
    return planes, receipt


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
    task: Task,
    batch_tokens: int,
    sink: Callable[[int, "torch.Tensor", np.ndarray], None],
    attempt: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[str]:
    """Run a task's captions through the LLM.

    A batch that does not fit into memory is run in halves.

    Args:
        sink: what :meth:`Encoder.encode` calls, and gets the rows where they belong besides.
        attempt: entered for each batch or part of one that is tried.

    Returns:
        A warning, if there were halves.
    """
    lengths = task.sequences.lengths
    halved = False

    def run(batch: np.ndarray) -> None:
        nonlocal halved
        starts, counts = task.row_start[batch], (lengths - task.kept)[batch]
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])

        def take(index: int, hidden: "torch.Tensor") -> None:
            sink(index, hidden, rows)

        try:
            with attempt():
                encoder.encode([task.sequences[i] for i in batch], task.kept[batch].tolist(), take)
            return
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not _is_out_of_memory(error):
                raise
        # Not within except: the error's traceback holds on to the activations.
        _free_memory()
        halved = True
        for half in np.array_split(batch, 2):
            run(half)

    done = 0
    for batch in batches(lengths, batch_tokens):
        run(np.asarray(batch))
        done += len(batch)
        report_progress(task.shard, done)
    return [HALVED] if halved else []


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def _free_memory() -> None:
    """Give back what the allocator keeps of a batch that did not fit: it is in pieces."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fit_sample(job: Job, task: Task, manifest: FeatureManifest) -> Fitted:
    """Encode a sample and fit the codec to it. Runs in a worker."""
    with _model_in_use:
        return _fit_to(job, task, manifest)


def _fit_to(job: Job, task: Task, manifest: FeatureManifest) -> Fitted:
    import torch

    torch.set_num_threads(manifest.layout.num_threads)
    identity, device = manifest.identity, own_device()
    encoder = _load_encoder(job.source, tuple(identity.layers), identity.dtype, device)
    num_rows = len(task.sequences.tokens) - int(task.kept.sum())
    shape = (num_rows, len(identity.layers), identity.model.width)
    sample = torch.empty(shape, dtype=getattr(torch, identity.dtype))

    def sink(index: int, hidden: "torch.Tensor", rows: np.ndarray) -> None:
        norms = torch.linalg.vector_norm(hidden.float(), dim=-1).cpu().numpy()
        _check_finite(norms, rows, identity.layers[index], task)
        sample[torch.from_numpy(rows), index] = hidden.cpu()

    warnings = _encode_batches(encoder, task, manifest.layout.batch_tokens, sink)
    spec = manifest.codec
    codec, bits_per_value = fit_codec(spec.name, sample, spec.quality)
    spec = fitted_spec(spec, codec, len(task.texts), num_rows)
    return Fitted(spec, dict(codec.parameters), bits_per_value, warnings)


def _check_finite(norms: np.ndarray, rows: np.ndarray, layer: int, task: Task) -> None:
    """Refuse NaN and infinity, by the norms of some rows of a layer, before they are coded."""
    bad = rows[~np.isfinite(norms)]
    if len(bad):
        entry = int(np.searchsorted(task.row_start, bad.min(), side="right")) - 1
        raise ValueError(
            f"hidden states of layer {layer} are not finite for the caption "
            f"{task.texts[entry]!r}; with --dtype bfloat16 try float32"
        )


def _sink_warnings(norms: np.ndarray, layers: Sequence[int], task: Task) -> list[str]:
    """Whether first kept tokens look like attention sinks."""
    counts = task.sequences.lengths - task.kept
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
