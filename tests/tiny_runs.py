"""Runs on the tiny pipelines of :mod:`tiny_pipelines`: made, not trained, with random weights in
place of learned ones; and the features of captions for them."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from semroute.pipeline.models.hub import find_model
from semroute.pipeline.models.llm import Encoder, describe_model, load_tokenizer, tokenizer_digest
from semroute.pipeline.text.captions import build_captions
from semroute.pipeline.text.presets import PRESETS
from semroute.schemas import (
    CaptionsIdentity,
    CheckpointState,
    Codec,
    FeatureIdentity,
    LatentIdentity,
    RunRecord,
    SamplesIdentity,
    Template,
    TrainConfig,
)
from semroute.trainer.adapters.pretrained import find_pretrained, load_transformer
from semroute.trainer.runs.checkpoint import save_checkpoint
from semroute.trainer.runs.record import adapt, trained_weights, write_record

SAMPLES = SamplesIdentity(num_samples=1, fingerprint=None)


@functools.cache
def features_of(
    pipeline: Path, preset: str, layers: tuple[int, ...] | None = None
) -> FeatureIdentity:
    """Identity of features of the pipeline's LLM, by default of all layers."""
    source = find_model(str(pipeline / PRESETS[preset].encoder))
    tokenizer, model = load_tokenizer(source), describe_model(source)
    raw = PRESETS[preset].final_norm == "raw"
    first = 0 if PRESETS[preset].reads_all == "from 0" else 1
    every = [*range(first, model.num_layers), model.num_layers + raw]
    return FeatureIdentity(
        model=model,
        tokenizer=tokenizer_digest(tokenizer),
        template=Template(
            text=PRESETS[preset].text,
            prefix_tokens=[],
            suffix_tokens=[],
            keep_prefix=False,
            processing=PRESETS[preset].processing(preset, tokenizer, causal=model.causal),
        ),
        layers=[*(layers or every)],
        final_norm="absent" if layers is not None else "raw" if raw else "normed",
        dtype="float32",
        attention="sdpa",
        max_length=PRESETS[preset].max_length(tokenizer, causal=model.causal),
        captions=CaptionsIdentity(num_captions=1, fingerprint="", seed=0),
        samples=SAMPLES,
    )


def make_run(
    pipeline: Path,
    preset: str,
    out: Path,
    *,
    size: float = 1.0,
    layers: Sequence[int] | None = None,
    model: Mapping[str, Any] | None = None,
    **routing: Any,
) -> Path:
    """A run with one checkpoint.

    Args:
        size: of the random numbers that are added to what it learns; 0: fresh weights.
        layers: that its features hold; by default all.
        model, routing: keys of its configuration.
    """
    config = TrainConfig.model_validate(
        {
            "features": "features",
            "latents": "latents",
            "output": str(out),
            "steps": 1,
            "model": {"kind": "pretrained", "pretrained": str(pipeline), **(model or {})},
            "routing": routing,
        }
    )
    found = find_pretrained(str(pipeline))
    features = features_of(pipeline, preset, None if layers is None else tuple(layers))
    record = RunRecord(
        config=config,
        features=features,
        codec=Codec(name="bf16"),
        latents=LatentIdentity(
            vae="pixels",
            shape=(4, 8, 8),
            dtype="uint8",
            scale=1.0,
            shift=0.0,
            images="",
            samples=SAMPLES,
        ),
        pretrained=found.identity(config.model, features.model.num_layers),
        model_source=str(pipeline / PRESETS[preset].encoder),
        versions={},
        created="",
    )
    out.mkdir(parents=True)
    write_record(out, record)
    network = adapt(record, load_transformer(found, config.model))
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in trained_weights(network).items()
    }
    saved = CheckpointState(step=1, num_ranks=1)
    save_checkpoint(out, saved, model=weights, ema=weights, optimizer={})
    return out


def encode(
    identity: FeatureIdentity, source: str, texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of texts as extraction has them, each a batch of its own, in fp32.

    Returns:
        [R, L, H], and offsets int64 [texts + 1].
    """
    return _encode(identity.model_dump_json(), source, tuple(texts))


@functools.cache
def _encode(document: str, source: str, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    identity = FeatureIdentity.model_validate_json(document)
    located = find_model(source)
    template = identity.template
    captions = build_captions(
        pa.array([[text] for text in texts], pa.list_(pa.string())),
        load_tokenizer(located),
        template=template.text,
        max_length=identity.max_length,
        processing=template.processing,
        causal=identity.model.causal,
    )
    encoder = Encoder(located, identity.layers, "float32", "cpu")
    hidden = []
    for (entry,) in captions.caption_ids.to_pylist():
        layers: list[Any] = [None] * len(identity.layers)
        sink = layers.__setitem__
        encoder.encode([captions.sequences[entry]], captions.rows.of([entry]), sink)
        hidden.append(torch.stack(layers, 1))
    return torch.cat(hidden), torch.from_numpy(np.cumsum([0, *map(len, hidden)]))
