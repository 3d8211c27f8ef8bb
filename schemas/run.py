"""``run.json``."""

from typing import Literal

from pydantic import Field

from .contract import Contract
from .manifest import Codec, FeatureIdentity, LatentIdentity, SamplesIdentity
from .train import TrainConfig


class SelectionRecord(Contract):
    """What a selection left, and left out."""

    num_samples: int = Field(ge=1)
    """That are trained on, held-out ones included."""
    num_captions: int = Field(ge=1)
    """Of these samples; one that several samples have counts for each."""
    left_out_samples: int = Field(ge=0)
    """That have a latent but no caption left."""
    left_out_captions: int = Field(ge=0)
    """By the filter, or by a weight of 0."""
    fingerprint: str
    """sha256 over the samples, their captions and weights."""


class MixtureRecord(Contract):
    """Another pair of stores that a run was trained on."""

    features: FeatureIdentity
    codec: Codec
    latents: LatentIdentity
    selection: SelectionRecord | None
    """Null where all samples take part."""


class RunRecord(Contract):
    """``run.json``: what a run was trained on, enough to sample from it without its stores."""

    format: Literal["semroute.run"] = "semroute.run"
    format_version: Literal[1] = 1
    config: TrainConfig
    features: FeatureIdentity
    codec: Codec
    latents: LatentIdentity
    validation: SamplesIdentity | None = None
    """Of the second pair of stores, where the run is measured by one."""
    selection: SelectionRecord | None = None
    """What ``data.select`` left of these stores, where it selects."""
    mixture: list[MixtureRecord] = Field(default_factory=list)
    """What ``data.mixture`` names."""
    model_source: str
    """The LLM as the extraction named it; needed only to encode new prompts."""
    vae_source: str = "pixels"
    """The VAE as the latent store named it; needed only to decode what is sampled."""
    versions: dict[str, str]
    created: str
