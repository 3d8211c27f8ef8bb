"""Prompts encoded for a pipeline of diffusers: the record in the metadata of their file."""

from typing import Literal

from .contract import Contract
from .manifest import ModelIdentity


class EmbedsRecord(Contract):
    """How prompts were encoded, and what the run that they were encoded for makes of them, if there
    is one."""

    format: Literal["semroute.embeds"] = "semroute.embeds"
    format_version: Literal[1] = 1
    pipeline: str
    """Class of the pipeline in diffusers."""
    model: ModelIdentity
    """The LLM."""
    base_layers: list[int]
    """LLM layers that the transformer reads, in its order."""
    prompts: list[str]
    negative: str | None
    """The negative prompt; null if the pipeline takes none."""
    learned: Literal["added", "layers", "none"]
    """``added``: the embeddings hold what the run learned about text. ``layers``: they are the
    pipeline's own, and the file also holds the LLM's layers, for semroute.attach. ``none``: the
    run learned nothing about text."""
    layers: list[int]
    """LLM layers that the file holds; empty unless ``learned`` is ``layers``."""
    network: bool
    """Whether the run changed weights of the transformer besides."""
    step: int | None
    """Training step of the run; null without one."""
    weights: Literal["ema", "model"] | None
