"""``config.json`` of a router that was exported on its own."""

from typing import Literal

from .contract import Contract, Positive
from .manifest import FeatureIdentity
from .mixes import Mixes
from .run import PretrainedIdentity
from .train import RoutingConfig


class RouterRecord(Contract):
    """A router's configuration, and the features that it can read."""

    format: Literal["semroute.router"] = "semroute.router"
    format_version: Literal[1] = 1
    routing: RoutingConfig
    layers: list[Positive]
    """LLM layers that alpha weighs, in the order of alpha."""
    num_llm_layers: Positive
    num_blocks: Positive
    text_width: Positive
    """Width of the hidden states (H)."""
    mixes: Mixes | None = None
    """Mixes of layers that the store of the run held instead of layers; null if it held layers."""
    features: FeatureIdentity
    """Identity of the hidden states that it was trained on."""
    pretrained: PretrainedIdentity | None = None
    """The pretrained network that it was trained for, whose own layers it adds to; null for our
    own network."""
    model_source: str
    """The LLM, as named in extraction."""
    step: int
    """Training step of the weights."""
    weights: Literal["ema", "model"]
    """``ema``: the run's moving average; ``model``: the weights themselves."""
