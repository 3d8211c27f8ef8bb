"""Mixes of layers: all that blocks read, once their weights are known. Arithmetic only, no storage.

Block d reads ``sum_l weights_dl LN(H^(l))``. The weights of D blocks are D vectors, often close to
fewer dimensions, and neighbouring layers are alike, so what blocks read is close to combinations of
K <= D mixes. The basis of rank K is the best in the least squares of what blocks read, each block
relative to its own norm (Eckart & Young 1936). With G the Gram matrix of LN(H^(l)) on a sample and
W the weights, each row divided by the root of its w G w^T, the directions of the basis are the
first K eigenvectors of W G W^T.

Shapes: R rows (tokens), L layers, H width, D blocks, K mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import InputError, Mixes, Routing
from .base import layer_norm
from .error import relative_errors

if TYPE_CHECKING:
    import torch

SAMPLE_ROWS = 2_048
"""Tokens to find a basis and to measure the errors of its ranks on."""
TOLERANCE = 1e-2
"""A rank is chosen whose mean relative error of what blocks read is below this, the error of the
codecs' default quality."""
MIN_EIGENVALUE = 1e-12
"""Relative to the largest; smaller ones are the rounding of float32 weights."""
CHUNK_ROWS = 128
"""Rows computed at a time."""


def mix(hidden: torch.Tensor, basis: Sequence[Sequence[float]]) -> torch.Tensor:
    """Mixes of normalised layers: any float ``[R, L, H]``, ``[K, L]`` -> float32 ``[R, K, H]``.

    LN is the parameter-free layer norm of routing, in float32. With the weights as the basis, the
    result is what blocks read.
    """
    return _matrix(basis, hidden.device) @ layer_norm(hidden)


def combine(mixes: torch.Tensor, coefficients: Sequence[Sequence[float]]) -> torch.Tensor:
    """Inputs of blocks from mixes: any float ``[R, K, H]``, ``[D, K]`` -> float32 ``[R, D, H]``."""
    return _matrix(coefficients, mixes.device) @ mixes.float()


def find_mixes(routing: Routing, sample: torch.Tensor, rank: int | None = None) -> Mixes:
    """Find the mixes that stand for a routing.

    Args:
        routing: over the layers of ``sample``, D blocks.
        sample: hidden states, any float dtype, ``[R, L, H]``, R at least 1.
        rank: how many; default: the fewest whose error is below :data:`TOLERANCE`.

    Raises:
        InputError: fewer mixes are independent.
    """
    weights = np.array(routing.weights)  # [D, L]
    gram = _gram(sample)
    norms = np.sqrt(np.einsum("dl,lm,dm->d", weights, gram, weights)).clip(1e-12)
    scaled = weights / norms[:, None]
    values, vectors = np.linalg.eigh(scaled @ gram @ scaled.T)  # ascending
    values, vectors = values[::-1], vectors[:, ::-1]
    highest = max(1, int(np.count_nonzero(values > MIN_EIGENVALUE * values[0])))
    if rank is not None and not 1 <= rank <= highest:
        raise InputError(
            f"--rank {rank}: the weights of strategy {routing.strategy} are {highest} independent "
            f"mixes; expected 1 to {highest}"
        )
    values, vectors = values[:highest].clip(1e-12), vectors[:, :highest]
    # Eigenvectors are unique up to their sign.
    vectors = vectors * np.where(vectors.sum(0) < 0, -1, 1)
    root = np.sqrt(values)
    basis = (vectors / root).T @ scaled  # [K, L]
    coefficients = norms[:, None] * vectors * root  # [D, K]
    errors = _errors(sample, weights, basis, coefficients)
    # The last rank is exact but for rounding, so there is always one.
    chosen = rank or 1 + next(k for k in range(highest) if errors[k] < TOLERANCE)
    return Mixes(
        **routing.model_dump(include=set(Routing.model_fields)),
        basis=basis[:chosen].tolist(),
        coefficients=coefficients[:, :chosen].tolist(),
        errors=errors,
        tolerance=TOLERANCE if rank is None else None,
    )


def _gram(sample: torch.Tensor) -> np.ndarray:
    """Mean over rows and channels of products of LN(H^(l)): ``[R, L, H]`` -> float64 ``[L, L]``.

    In float64: a product in float32 need not be symmetric, and the asymmetry looks like another
    independent mix.
    """
    import torch

    num_rows, num_layers, width = sample.shape
    total = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    for part in sample.split(CHUNK_ROWS):
        flat = layer_norm(part).transpose(0, 1).flatten(1).double()  # [L, R * H]
        total += flat @ flat.T
    return total.numpy() / (num_rows * width)


def _errors(
    sample: torch.Tensor, weights: np.ndarray, basis: np.ndarray, coefficients: np.ndarray
) -> list[float]:
    """Mean relative error of what blocks read from the first 1, 2, ..., K mixes, on a sample."""
    totals = np.zeros(len(basis))
    for part in sample.split(CHUNK_ROWS):
        expected = mix(part, weights.tolist())  # [R, D, H]
        mixes = mix(part, basis.tolist())  # [R, K, H]
        rest = expected  # what the first k mixes do not give
        for k in range(len(basis)):
            rest = rest - combine(mixes[:, k : k + 1], coefficients[:, k : k + 1].tolist())
            totals[k] += float(relative_errors(expected, rest)[0].sum())
    return (totals / (len(sample) * len(weights))).tolist()


def _matrix(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.float32, device=device)
