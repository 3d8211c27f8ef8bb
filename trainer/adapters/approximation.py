"""What is learned at a network's input, as weights of the layers that the network reads itself.

A network that is routed at its input reads ``x_k = base_k + change_k`` in place of each of its own
layers. Other programs can only weigh those layers, so that x_k is about ``sum_j A_kj base_j``: a
diagonal A is a gain per layer, which node packs have a field for, and any A can be folded into a
linear layer that reads the layers side by side. A is fitted by least squares to tokens, each
divided by its own deviation std(base_k), so that tokens of large norm do not decide alone.

Shapes: R rows (tokens), K base layers (taps), H text width, O outputs, I = K H inputs, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...schemas import LN_EPS
from ..model.router import Learned


@dataclass(frozen=True)
class Fit:
    """Weights of the base layers.

    Attributes:
        matrix: A, float64 [K, K].
        error: what of the learned change is missing, relative to it: 0 is exact, 1 is nothing.
    """

    matrix: Tensor
    error: float


def exact_gains(gains: Tensor) -> Fit:
    """A gain per layer [K], which is the change itself."""
    return Fit(gains.double().diag(), 0.0)


def fit_layers(
    router: Learned, hidden: Tensor, base_layers: Sequence[int], *, diagonal: bool
) -> Fit:
    """The weights of base layers that come closest to a router at the input.

    Args:
        router: its weights do not depend on t; it makes one mix for all base layers, or one each.
        hidden: [R, len(router.layers_read), H], tokens to fit to.
        diagonal: only a gain per layer.
    """
    positions = [router.layers_read.index(layer) for layer in base_layers]
    base = hidden[:, positions].double()  # [R, K, H]
    deviation = (base.var(-1, unbiased=False, keepdim=True) + LN_EPS).sqrt()  # [R, K, 1]
    with torch.no_grad():
        change = router.deviation(hidden).double().expand(base.shape)  # in units of deviation
    matrix, missing = torch.eye(len(base_layers), dtype=torch.float64), 0.0
    for tap in range(len(base_layers)):
        units = base / deviation[:, tap : tap + 1]
        used = [tap] if diagonal else [*range(len(base_layers))]
        columns = units[:, used].transpose(0, 1).flatten(1)  # [K or 1, R H]
        target = change[:, tap].flatten()
        gram = columns @ columns.mT
        row = torch.linalg.lstsq(gram, (columns @ target)[:, None]).solution[:, 0]
        matrix[tap, used] += row
        missing += float((target - row @ columns).square().sum())
    total = float(change.square().sum())
    return Fit(matrix, (missing / total) ** 0.5 if total else 0.0)


def linear_change(weight: Tensor, matrix: Tensor) -> Tensor:
    """Change of a linear layer [O, K H] that reads the base layers side by side, by which it reads
    their weighted sums: fp32 [O, K H]."""
    slices = weight.float().unflatten(1, (len(matrix), -1))  # [O, K, H]
    step = (matrix - torch.eye(len(matrix), dtype=matrix.dtype)).float()
    return torch.einsum("okh,kj->ojh", slices, step).flatten(1)


def low_rank(change: Tensor, rank: int | None) -> tuple[tuple[Tensor, Tensor], float]:
    """The closest product of matrices B [O, r] and A [r, I] to a change [O, I].

    Args:
        rank: r; None: as many as make it exact.

    Returns:
        A and B, and the error relative to the change.
    """
    largest = min(change.shape)
    if rank is None or rank >= largest:
        eye = torch.eye(largest)
        return ((change, eye) if largest == change.shape[0] else (eye, change)), 0.0
    total = float(change.double().square().sum())
    if not total:
        return (change.new_zeros(rank, change.shape[1]), change.new_zeros(len(change), rank)), 0.0
    wide = change.double() if change.shape[0] <= change.shape[1] else change.double().mT
    directions = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:]  # largest last
    rest = (directions.mT @ wide).float()
    left = directions.float()
    second, first = (left, rest) if wide.shape == change.shape else (rest.mT, left.mT)
    missing = float((change - second @ first).double().square().sum())
    return (first, second), (missing / total) ** 0.5
