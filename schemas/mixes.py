"""Mixes of LLM layers: what a store holds instead of layers once the weights of a run are known."""

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
"""Weights no farther apart are the same, computed on another device."""


class Routing(Contract):
    """How the blocks of a run weigh the LLM's layers, where that does not change with t."""

    strategy: Literal["penultimate", "uniform", "static", "depth", "one-per-block"]
    step: int = Field(ge=0)
    """Of the run's checkpoint."""
    source: Literal["ema", "model"]
    """Which weights of the checkpoint."""
    layers: list[int] = Field(min_length=1)
    """LLM layers that are weighed."""
    weights: Matrix
    """alpha: a row a block, or one row for all blocks; a number a layer."""

    @model_validator(mode="after")
    def _rectangular(self) -> "Routing":
        _check(self.weights, "weights", columns=len(self.layers))
        return self

    def distance(self, layers: Sequence[int], weights: Sequence[Sequence[float]]) -> float:
        """The largest difference to other weights; infinite for other layers or numbers of blocks.

        One row stands for as many as the other has.
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
    """K mixes of layers a token, of which blocks read combinations.

    Mix k is ``M_k = sum_l basis_kl LN(H^(l))``; block d reads ``sum_k coefficients_dk M_k``, which
    is ``sum_l weights_dl LN(H^(l))`` up to the error of the rank.
    """

    basis: Matrix
    """A row a mix, a number a layer; each mix has a mean square of 1."""
    coefficients: Matrix
    """A row a block, or one row for all blocks; a number a mix."""
    errors: list[float]
    """By rank, from 1: mean relative error of what blocks read that the rank makes, on a sample."""
    tolerance: float | None
    """The rank is the smallest with an error under this; null where the rank was asked for."""

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
        """K."""
        return len(self.basis)

    @property
    def error(self) -> float:
        """Mean relative error of what blocks read that this rank makes, on a sample."""
        return self.errors[self.num_mixes - 1]


def _check(matrix: Matrix, name: str, *, columns: int, rows: int | None = None) -> None:
    widths = sorted({len(row) for row in matrix})
    if widths != [columns] or len(matrix) != (rows or len(matrix)):
        raise ValueError(
            f"{name} is {len(matrix)} rows of {widths} numbers; expected {rows or 'rows'} of "
            f"{columns}"
        )
