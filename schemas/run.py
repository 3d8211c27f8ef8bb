"""``run.json``: the record of a training run."""

from typing import Any, Literal

from pydantic import Field

from .contract import Contract
from .llm_attention import LlmAttention
from .manifest import Codec, FeatureIdentity, LatentIdentity, SamplesIdentity
from .train import TrainConfig


class SelectionRecord(Contract):
    """Result of selecting samples and captions."""

    num_samples: int = Field(ge=1)
    """Samples that are left, including held-out ones."""
    num_captions: int = Field(ge=1)
    """Captions of these samples; one that several samples have counts for each of them."""
    left_out_samples: int = Field(ge=0)
    """Samples that have a latent but no caption left."""
    left_out_captions: int = Field(ge=0)
    """Captions left out by the filter, or by a weight of 0."""
    fingerprint: str
    """sha256 over the samples, their captions and weights."""


class MixtureRecord(Contract):
    """A further pair of stores that a run was trained on."""

    features: FeatureIdentity
    codec: Codec
    latents: LatentIdentity
    selection: SelectionRecord | None
    """Null if all samples take part."""


class PretrainedIdentity(Contract):
    """The pretrained transformer that a run adapts. Files are compared by content."""

    family: str
    """Name of the family, see docs/adapters.md."""
    pipeline: str | None
    """Class of its pipeline in diffusers, if it was named."""
    transformer: str
    """Class of the transformer in diffusers."""
    base_layers: list[int]
    """LLM layers that it was trained with, in its order."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """Configuration of its scheduler."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the transformer."""
    files: dict[str, str]
    """File name -> sha256, for its configuration and weights."""


class RunRecord(Contract):
    """``run.json``: everything needed to sample from a run without its stores."""

    format: Literal["semroute.run"] = "semroute.run"
    format_version: Literal[1] = 1
    config: TrainConfig
    features: FeatureIdentity
    codec: Codec
    latents: LatentIdentity
    validation: SamplesIdentity | None = None
    """Samples of the second pair of stores, if validation uses one."""
    selection: SelectionRecord | None = None
    """Result of ``data.select`` on these stores, if it selects."""
    mixture: list[MixtureRecord] = Field(default_factory=list)
    """The stores of ``data.mixture``."""
    pretrained: PretrainedIdentity | None = None
    """The pretrained transformer, if one is adapted."""
    llm_attention: LlmAttention | None = None
    """The LLM's keys and values that blocks read, with strategy ``deep-fusion``."""
    model_source: str
    """The LLM, as named in extraction; needed only to encode new prompts."""
    vae_source: str = "pixels"
    """The VAE, as named in the latent store; needed only to decode samples."""
    id: str | None = None
    """32 random hexadecimal digits, by which trackers know the run when it is resumed; null in
    records of early versions."""
    threads: int | None = Field(None, ge=1)
    """Threads of a process on a CPU when the run began, which the same bits need; null in records
    of early versions."""
    versions: dict[str, str]
    created: str
