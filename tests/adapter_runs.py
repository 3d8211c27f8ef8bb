"""Run directories on tiny pretrained pipelines whose trained weights are random, without stores."""

from pathlib import Path
from typing import Any

import torch

from semroute.schemas import (
    CaptionsIdentity,
    CheckpointState,
    Codec,
    FeatureIdentity,
    LatentIdentity,
    ModelIdentity,
    RunRecord,
    SamplesIdentity,
    Template,
    TrainConfig,
)
from semroute.trainer.adapters.pretrained import find_pretrained
from semroute.trainer.runs.checkpoint import save_checkpoint
from semroute.trainer.runs.record import build_model, trained_weights, write_record

SAMPLES = SamplesIdentity(num_samples=4, fingerprint=None)
TEMPLATE = "a `b` ```c``` | {caption}"
"""Holds what Markdown would take for its own."""


def write_run(
    path: Path,
    pipeline: Path,
    *,
    train: str,
    num_llm_layers: int = 6,
    routing: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    features: Any = None,
    architecture: str = "llama",
) -> Path:
    """Write a run of one step.

    Args:
        pipeline: folder of the pretrained pipeline.
        features: a feature store that the run names; otherwise its identity is made up.
    """
    found = find_pretrained(str(pipeline))
    config = TrainConfig.model_validate(
        {
            "features": "/nowhere" if features is None else str(features.path),
            "latents": "/nowhere",
            "output": str(path),
            "steps": 1,
            "model": {
                "kind": "pretrained",
                "pretrained": str(pipeline),
                "train": train,
                **({} if lora is None else {"lora": lora}),
            },
            "routing": routing or {},
        }
    )
    identity = make_identity(architecture, num_llm_layers, found.family.text_width(found.config))
    if found.family.name == "fibo":
        identity.layers.insert(0, 0)
    if features is not None:
        identity = features.manifest.identity
    record = RunRecord(
        config=config,
        features=identity,
        codec=Codec(name="bf16"),
        latents=LatentIdentity(
            vae="pixels",
            shape=(found.family.latents(found.config)[0], 8, 8),
            dtype="uint8",
            scale=1.0,
            shift=0.0,
            images="",
            samples=SAMPLES,
        ),
        pretrained=found.identity(config.model, identity.model.num_layers),
        model_source="an/llm",
        versions={"diffusers": "0.42.1"},
        created="2026-11-29T00:00:00+00:00",
    )
    model = build_model(record)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise)
    path.mkdir(parents=True)
    write_record(path, record)
    weights = trained_weights(model)
    saved = CheckpointState(step=1, num_ranks=1)
    save_checkpoint(path, saved, model=weights, ema=weights, optimizer={})
    return path


def make_identity(architecture: str, num_layers: int, width: int) -> FeatureIdentity:
    """Features of all layers of an LLM."""
    return FeatureIdentity(
        model=ModelIdentity(
            architecture=architecture, num_layers=num_layers, width=width, files={}
        ),
        tokenizer="",
        template=Template(text=TEMPLATE, prefix_tokens=[], suffix_tokens=[], keep_prefix=False),
        layers=[*range(1, num_layers + 1)],
        final_norm="normed",
        dtype="float32",
        attention="sdpa",
        max_length=64,
        captions=CaptionsIdentity(num_captions=4, fingerprint="", seed=0),
        samples=SAMPLES,
    )
