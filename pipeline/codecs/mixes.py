"""Mixes of layers: all that blocks read, once their weights are known. Arithmetic only, no storage.

Block d reads ``sum_l weights_dl LN(H^(l))``. The weights of D blocks are D vectors, often close to
fewer dimensions, and neighbouring layers are alike, so what blocks read is close to combinations of
K <= D mixes. The basis of rank K is the best in the least squares of what blocks read, each block
relative to its own norm (Eckart & Young 1936). With G the Gram matrix of LN(H^(l)) on a sample and
W the weights, each row divided by the root of its w G w^T, its directions are the first K
eigenvectors of W G W^T.

Shapes: R rows (tokens), L layers, H width, D blocks, K mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import InputError, Mixes, Routing
from .base import LN_EPS
from .error import relative_errors

if TYPE_CHECKING:
    import torch


SAMPLE_ROWS = 2_048
"""Tokens on which a basis is found and the errors of its ranks are measured."""
TOLERANCE = 1e-2
"""Mean relative error of what blocks read under which a rank is chosen: that of the codecs' default
quality."""
MIN_EIGENVALUE = 1e-12
"""Of the largest; smaller ones are the rounding of float32 weights."""
CHUNK_ROWS = 128
"""Rows computed on at a time."""


def mix(hidden: torch.Tensor, basis: Sequence[Sequence[float]]) -> torch.Tensor:
    """Mixes of normalised layers: any float ``[R, L, H]``, ``[K, L]`` -> float32 ``[R, K, H]``.

    LN is the parameter-free layer norm of routing, in float32. With weights in place of a basis it
    is what blocks read.
    """
    import torch

    normed = torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=LN_EPS)
    return _matrix(basis, hidden.device) @ normed


def combine(mixes: torch.Tensor, coefficients: Sequence[Sequence[float]]) -> torch.Tensor:
    """What blocks read: any float ``[R, K, H]``, ``[D, K]`` -> float32 ``[R, D, H]``."""
    return _matrix(coefficients, mixes.device) @ mixes.float()


def find_mixes(routing: Routing, sample: torch.Tensor, rank: int | None = None) -> Mixes:
    """The mixes that stand for a routing.

    Args:
        routing: over the layers of ``sample``, D blocks.
        sample: hidden states, any float dtype, ``[R, L, H]``, R at least 1.
        rank: how many; default the fewest whose error is under :data:`TOLERANCE`.

    Raises:
        InputError: there are not so many independent mixes.
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
    vectors = vectors * np.where(
        vectors.sum(0) < 0, -1, 1
    )  # eigenvectors have no sign of their own
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

    In float64: a product in float32 need not be symmetric, and what it lacks looks like another
    independent mix.
    """
    import torch

    num_rows, num_layers, width = sample.shape
    total = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    for part in sample.split(CHUNK_ROWS):
        normed = torch.nn.functional.layer_norm(part.float(), (width,), eps=LN_EPS)
        flat = normed.transpose(0, 1).flatten(1).double()  # [L, R * H]
        total += flat @ flat.T
    return total.numpy() / (num_rows * width)


def _errors(
    sample: torch.Tensor, weights: np.ndarray, basis: np.ndarray, coefficients: np.ndarray
) -> list[float]:
    """Mean relative error of what blocks read from the first 1, 2 ... K mixes of a sample."""
    totals = np.zeros(len(basis))
    for part in sample.split(CHUNK_ROWS):
        expected = mix(part, weights.tolist())  # [R, D, H]
        mixes = mix(part, basis.tolist())  # [R, K, H]
        left = expected
        for k in range(len(basis)):
            left = left - combine(mixes[:, k : k + 1], coefficients[:, k : k + 1].tolist())
            totals[k] += float(relative_errors(expected, left)[0].sum())
    return (totals / (len(sample) * len(weights))).tolist()


def _matrix(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.float32, device=device)
