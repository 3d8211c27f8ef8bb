"""The JSON files of a checkpoint."""

from typing import Literal

from pydantic import Field

from .contract import Contract
from .receipt import WrittenFile

MAX_RANKS = 100_000


class WindowState(Contract):
    """Steps since the last line of metrics, one number each."""

    losses: list[float] = Field(default_factory=list)
    norms: list[float] = Field(default_factory=list)
    """Gradient norms before clipping."""


class CheckpointState(Contract):
    """``state.json``: the state of training besides tensors."""

    step: int = Field(ge=0)
    window: WindowState = WindowState()
    """What the next line of metrics needs."""
    num_ranks: int | None = Field(None, ge=1, le=MAX_RANKS)
    """Number of processes that wrote the checkpoint, each a part. Null in checkpoints of early
    versions, which have no ``checksums.json`` either."""


class Cut(Contract):
    """The place of a piece in a tensor that FSDP2 shards along one dimension."""

    shape: list[int]
    """Shape of the whole tensor."""
    dim: int = Field(ge=0)
    start: int = Field(ge=0)
    """Index of its first row in the whole tensor."""


class Cuts(Contract):
    """``cuts`` in the metadata of a safetensors file of a checkpoint."""

    tensors: dict[str, Cut] = Field(default_factory=dict)
    """Name -> place, for each tensor of which the file holds a piece; all others are whole."""


class CheckpointFiles(Contract):
    """``checksums.json`` of a checkpoint, which is checked when the checkpoint is read."""

    format: Literal["semroute.checkpoint"] = "semroute.checkpoint"
    format_version: Literal[1] = 1
    files: dict[str, WrittenFile]
    """File name -> size and sha256."""
