"""``adapter.json``: what a run on a pretrained network learned, apart from the run."""

from typing import Literal

from .contract import Contract
from .run import RunRecord


class AdapterRecord(Contract):
    """The run that an exported adapter comes from, and which of its weights these are."""

    format: Literal["semroute.adapter"] = "semroute.adapter"
    format_version: Literal[1] = 1
    run: RunRecord
    """``run.json`` of the run."""
    step: int
    """Training step of the weights."""
    weights: Literal["ema", "model"]
    """``ema``: the run's moving average; ``model``: the weights themselves."""
