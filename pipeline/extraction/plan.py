"""Captions, model and identity of an extraction, known before the LLM runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ...schemas import (
    CAPTIONS_SCHEMA,
    SAMPLES_EXTRA,
    SAMPLES_SCHEMA,
    FeatureIdentity,
    FeatureManifest,
    InputError,
    SamplesIdentity,
    final_norm_of,
)
from ..models.limits import Limits, beyond_training, refuse_beyond
from ..sources.table import SampleTable, read_samples
from ..store.layout import Packing
from ..text.captions import Captions, deduplicate, tokenize_captions
from ..text.presets import DEFAULT_LENGTH, Preset, check_base, read_template
from ..text.templates import foreign_markers
from .requests import CaptionsRequest

if TYPE_CHECKING:
    from ..models.hub import ModelFiles


CPU_BATCH_TOKENS = 512
"""Best of 128 to 4,096 on two CPU cores with SmolLM2-135M."""
GPU_BATCH_TOKENS = 16_384
LINE_TOKENS = 128
"""Tokens of a packed row: few, because a token's attention costs as much as its row is long, but
several captions, so that little of a row is left over."""

_OF_LAST_BLOCK = {
    "absent": "no output of the last block",
    "normed": "that of the last block after the final norm",
    "raw": "that of the last block before the final norm",
    "both": "both outputs of the last block",
}
TABLE_ROWS = 65_536
"""Captions per record batch of captions.parquet."""


@dataclass(frozen=True)
class Plan:
    """Samples, captions and model of an extraction.

    Attributes:
        model: where the LLM is.
        samples: the user's table; of a new store without the texts.
        captions: unique, templated, tokenised, in store order.
        identity: what resume and training compare.
        earlier: identities of the samples each time before the store grew.
        foreign_markers: of the template, which the LLM has no token for.
        limits: what the LLM can read.
    """

    model: ModelFiles
    samples: SampleTable
    captions: Captions
    identity: FeatureIdentity
    earlier: list[SamplesIdentity]
    foreign_markers: list[str]
    limits: Limits

    def samples_table(self) -> pa.Table:
        """samples.parquet: one row per input row."""
        return samples_table(self.samples, self.captions.caption_ids)

    def captions_table(self, packing: Packing) -> pa.Table:
        """captions.parquet: one row per unique caption."""
        return pa.Table.from_batches(self.caption_batches(packing), CAPTIONS_SCHEMA)

    def captions_reader(self, packing: Packing) -> pa.RecordBatchReader:
        """The same table, of which only a block is held at a time."""
        return pa.RecordBatchReader.from_batches(CAPTIONS_SCHEMA, self.caption_batches(packing))

    def caption_batches(self, packing: Packing) -> Iterator[pa.RecordBatch]:
        """The rows of captions.parquet, a block at a time."""
        captions = self.captions
        for first in range(0, len(captions), TABLE_ROWS):
            part = slice(first, min(first + TABLE_ROWS, len(captions)))
            stored = captions.rows[part].tokens(captions.sequences[part])
            starts, lengths = packing.row_start[part], stored.lengths
            tokens = pa.ListArray.from_arrays(
                pa.array(stored.offsets, pa.int32()), pa.array(stored.tokens)
            )
            columns = [
                np.arange(part.start, part.stop),
                captions.texts[part].cast(pa.string()),
                tokens,
                lengths,
                captions.num_cut[part],
                packing.shard[part],
                starts,
                starts + lengths,
            ]
            arrays = [
                column if isinstance(column, pa.Array) else pa.array(column, field.type)
                for column, field in zip(columns, CAPTIONS_SCHEMA, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=CAPTIONS_SCHEMA)

    def report_warnings(self, report: Callable[[str], None]) -> None:
        """Say what was found, and warn about foreign chat markers, and captions that are too long
        or truncated."""
        report(self.samples.describe())
        if self.foreign_markers:
            report(
                f"warning: the template has {', '.join(self.foreign_markers)}, which this LLM's "
                "tokenizer has no token for and spells out; it was made for another LLM"
            )
        processing = self.identity.template.processing
        if processing is not None:
            missing = check_base(
                processing.preset, self.identity.model.num_layers, self.identity.layers
            )
            if missing:
                report(f"warning: {missing}")
        captions = self.captions
        beyond = beyond_training(self.limits, captions.sequences, captions.texts)
        if beyond:
            report(f"warning: {beyond}")
        cut = np.flatnonzero(captions.num_cut)
        if not len(cut):
            return
        report(
            f"warning: {len(cut):,} captions are longer than {self.identity.max_length} tokens and "
            "lose their end (captions.parquet has num_cut_tokens), for example:"
        )
        for entry in cut[np.argsort(-captions.num_cut[cut], kind="stable")[:3]]:
            text = captions.texts[entry].as_py()
            shown = text if len(text) <= 70 else f"{text[:67]}..."
            report(f"  -{captions.num_cut[entry]} tokens: {shown!r}")


def make_plan(
    request: CaptionsRequest, existing: FeatureManifest | None = None, *, weights: bool = True
) -> Plan:
    """Read, deduplicate and tokenise the captions; no weights are loaded.

    Args:
        request: a dtype of ``auto`` is bfloat16 where this machine has a GPU, and float32
            elsewhere.
        existing: manifest of the store that is resumed: where it has fewer samples than the file,
            its captions come first, in its order.
        weights: without, the LLM's are not needed; its identity is then not complete.

    Raises:
        InputError: bad input.
    """
    import torch

    from ..models.hub import find_model
    from ..models.llm import (
        attention_of,
        check_streams,
        describe_model,
        load_tokenizer,
        model_limits,
        tokenizer_digest,
    )

    preset = _preset(request.template, existing)
    samples = read_samples(request.source, **request.text_options, limit=request.limit, need="text")
    counts = [] if existing is None else [g.samples.num_samples for g in existing.generations]
    earlier = [count for count in counts if count < len(samples)]
    located = find_model(request.model, weights=weights)
    described = describe_model(located)
    chosen = _choose_layers(request, preset, described.num_layers)
    check_streams(located, chosen)
    tokenizer, causal = load_tokenizer(located), described.causal
    max_length, keep_prefix, processing = DEFAULT_LENGTH, bool(request.keep_prefix), None
    if preset.pipelines:
        max_length = preset.max_length(tokenizer, causal=causal)
        processing = preset.processing(
            request.template, tokenizer, causal=causal, keep_prefix=request.keep_prefix
        )
        keep_prefix = processing.dropped_rows == (0, 0)
    max_length = request.max_length or max_length
    identities = [samples.slice(0, count).identity() for count in earlier]
    samples_identity = samples.identity()
    unique = deduplicate(samples.texts(), request.seed, earlier)
    if existing is None:  # a store that grows is compared with them
        samples = samples.without_texts()
        pa.default_memory_pool().release_unused()
    captions = tokenize_captions(
        unique,
        tokenizer,
        template=preset.text,
        max_length=max_length,
        keep_prefix=keep_prefix,
        processing=processing,
        causal=causal,
        seed=request.seed,
    )
    limits = model_limits(located)
    refuse_beyond(located.name, limits, captions.sequences, captions.texts, tokenizer)
    dtype = request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    identity = FeatureIdentity(
        model=described,
        tokenizer=tokenizer_digest(tokenizer),
        template=captions.template,
        layers=chosen,
        final_norm=final_norm_of(chosen, described.num_layers),
        dtype=dtype,
        attention=attention_of(located),
        max_length=max_length,
        captions=captions.identity,
        samples=samples_identity,
    )
    markers = foreign_markers(preset.text, tokenizer)
    return Plan(located, samples, captions, identity, identities, markers, limits)


def _choose_layers(request: CaptionsRequest, preset: Preset, num_layers: int) -> list[int]:
    """Numbers of the layers to store.

    Args:
        num_layers: of the LLM.

    Raises:
        InputError: no such layers, or not those of the final norm that was asked for.
    """
    from ..models.llm import parse_layers

    chosen = parse_layers(
        request.layers,
        num_layers,
        request.final_norm or preset.final_norm,
        embedding=preset.reads_all == "from 0",
    )
    final_norm = final_norm_of(chosen, num_layers)
    if request.final_norm not in (None, final_norm):
        raise InputError(
            f"--final-norm {request.final_norm}: --layers {request.layers} names "
            f"{_OF_LAST_BLOCK[final_norm]}; layer {num_layers} is taken after the final norm, and "
            f"{num_layers + 1} before it"
        )
    return chosen


def _preset(name: str, existing: FeatureManifest | None) -> Preset:
    """A preset or file; where an early version made the store, which knew presets as plain
    templates, the plain template."""
    preset = read_template(name)
    if existing is None or existing.identity.template.processing is not None:
        return preset
    same = existing.identity.template.text == preset.text
    return Preset(preset.text) if same else preset


def samples_table(samples: SampleTable, caption_ids: pa.ListArray) -> pa.Table:
    """samples.parquet of a store of captions: one row per input row."""
    columns = [pa.array(np.arange(len(samples))), caption_ids, samples.image_names()]
    return with_extra(pa.table(columns, schema=SAMPLES_SCHEMA), samples)


def with_extra(table: pa.Table, samples: SampleTable) -> pa.Table:
    """A table of samples with ``source_row`` and ``caption_weights``, where the samples have
    them."""
    for name, column in samples.extra_columns().items():
        field = SAMPLES_EXTRA.field({"row": "source_row", "weights": "caption_weights"}[name])
        table = table.append_column(field, column)
    return table


def default_batch_tokens(have_gpus: bool | None = None) -> int:
    """Default number of tokens per batch.

    Args:
        have_gpus: whether the LLM runs on GPUs; default: whether this machine has any.
    """
    import torch

    if have_gpus is None:
        have_gpus = torch.cuda.is_available()
    return GPU_BATCH_TOKENS if have_gpus else CPU_BATCH_TOKENS
