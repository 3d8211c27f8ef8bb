"""Attention of an LLM that blocks of the DiT share, as the record of a run describes it."""

from typing import Self

from pydantic import Field, model_validator

from .contract import Contract

NULL = "null"
"""Name, among the tensors of a batch's captions, of whether each is the null caption."""


class LlmAttention(Contract):
    """Keys and values of some layers of the LLM that a run reads with strategy ``deep-fusion``.

    Their weights are in ``llm.safetensors``, beside ``run.json``.
    """

    layers: list[int] = Field(min_length=1)
    """Stored layers that are read, ascending. Layer l enters block l + 1 of the LLM, whose norm and
    projections are applied to it."""
    num_heads: int = Field(ge=1)
    """Heads of the LLM's queries."""
    num_kv_heads: int = Field(ge=1)
    """Heads of its keys and values; divides ``num_heads``."""
    head_dim: int = Field(ge=1)
    """Width of a head."""
    eps: float = Field(gt=0)
    """Added to the mean square in its norms."""
    bias: bool
    """Whether keys and values have a bias."""
    key_norm: bool
    """Whether the keys of each head are normed."""
    first_position: int = Field(ge=0)
    """Position of a caption's first stored token in its sequence; that of the null caption is 0."""
    sha256: str | None = None
    """sha256 of ``llm.safetensors``."""

    @model_validator(mode="after")
    def _grouped(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self
