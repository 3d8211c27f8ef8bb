"""``config.json`` of a router that was exported alone."""

from typing import Literal

from .contract import Contract
from .manifest import FeatureIdentity
from .mixes import Mixes
from .train import Positive, RoutingConfig


class RouterRecord(Contract):
    """What its weights are of, and what they may be given."""

    format: Literal["semroute.router"] = "semroute.router"
    format_version: Literal[1] = 1
    routing: RoutingConfig
    layers: list[Positive]
    """LLM layers that alpha weighs, in its order."""
    num_llm_layers: Positive
    num_blocks: Positive
    text_width: Positive
    """H: width of the hidden states."""
    mixes: Mixes | None = None
    """What the store of the run held in place of layers, where it did."""
    features: FeatureIdentity
    """Of the hidden states that it was trained on."""
    model_source: str
    """The LLM as the extraction named it."""
    step: int
    """Of the run."""
    weights: Literal["ema", "model"]
    """The run's moving average, or the weights themselves."""
