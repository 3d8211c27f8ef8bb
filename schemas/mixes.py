"""Mixes of LLM layers, which a store can hold instead of layers once a run's weights are known."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal

from pydantic import Field, model_validator

from .contract import Contract

Matrix = list[list[float]]
LN_EPS = 1e-5
"""Epsilon of LN, the parameter-free layer norm that routing applies (arXiv 2602.03510, reference
code)."""
SAME_WEIGHTS = 1e-5
"""Largest difference of weights that counts as equal: other devices round differently."""


class Routing(Contract):
    """Weights of the LLM's layers for the blocks of a run, if they do not depend on t."""

    strategy: Literal["penultimate", "uniform", "static", "depth", "one-per-block"]
    step: int = Field(ge=0)
    """Step of the run's checkpoint."""
    source: Literal["ema", "model"]
    """Which weights of the checkpoint: its moving average, or the weights themselves."""
    layers: list[int] = Field(min_length=1)
    """LLM layers that the weights are of."""
    weights: Matrix
    """alpha: one row per block, or one row for all blocks; one number per layer."""

    @model_validator(mode="after")
    def _rectangular(self) -> "Routing":
        _check(self.weights, "weights", columns=len(self.layers))
        return self

    def distance(self, layers: Sequence[int], weights: Sequence[Sequence[float]]) -> float:
        """Largest difference from other weights; infinite if layers or numbers of blocks differ.

        A single row stands for all blocks.
        """
        num_blocks = max(len(self.weights), len(weights))
        if [*layers] != self.layers or {len(self.weights), len(weights)} - {1, num_blocks}:
            return math.inf
        own, other = (
            [*rows] * (num_blocks if len(rows) == 1 else 1) for rows in (self.weights, weights)
        )
        pairs = zip(chain.from_iterable(own), chain.from_iterable(other), strict=True)
        return max(abs(a - b) for a, b in pairs)


class Mixes(Routing):
    """K mixes of layers per token, of which blocks read linear combinations.

    Mix k is ``M_k = sum_l basis_kl LN(H^(l))``; block d reads ``sum_k coefficients_dk M_k``, which
    is ``sum_l weights_dl LN(H^(l))`` up to the error of the rank.
    """

    basis: Matrix
    """One row per mix, one number per layer; each mix has a mean square of 1."""
    coefficients: Matrix
    """One row per block, or one row for all blocks; one number per mix."""
    errors: list[float]
    """By rank, from 1: mean relative error of what blocks read due to the rank, on a sample."""
    tolerance: float | None
    """The rank is the smallest with an error below this; null if the rank was chosen."""

    @model_validator(mode="after")
    def _consistent(self) -> "Mixes":
        _check(self.basis, "basis", columns=len(self.layers))
        rows = len(self.weights)
        _check(self.coefficients, "coefficients", columns=len(self.basis), rows=rows)
        if len(self.errors) < len(self.basis):
            raise ValueError(f"errors holds {len(self.errors)} ranks; expected {len(self.basis)}")
        return self

    @property
    def num_mixes(self) -> int:
        """Number of mixes (K)."""
        return len(self.basis)

    @property
    def error(self) -> float:
        """Mean relative error of what blocks read due to this rank, on a sample."""
        return self.errors[self.num_mixes - 1]


def _check(matrix: Matrix, name: str, *, columns: int, rows: int | None = None) -> None:
    widths = sorted({len(row) for row in matrix})
    if widths != [columns] or len(matrix) != (rows or len(matrix)):
        raise ValueError(
            f"{name} is {len(matrix)} rows of {widths} numbers; expected {rows or 'rows'} of "
            f"{columns}"
        )
