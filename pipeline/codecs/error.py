"""Error that a codec makes in LN(h), which routing reads: measured, never assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import LN_EPS, Receipt
from .base import layer_norm
from .kernels import measure_errors
from .loops import in_parts

if TYPE_CHECKING:
    import torch

NUM_LARGEST = 3
"""Channels left out of the second pair of errors: massive activations hide all others."""


def relative_errors(
    expected: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative L2 error of each vector, whole and without the three largest channels.

    Args:
        expected, error: float32 ``[..., H]``.

    Returns:
        Both ``[...]``; 0 where ``expected`` is zero.
    """
    expected, error = expected.square(), error.square()
    largest = expected.topk(min(NUM_LARGEST, expected.shape[-1] - 1), dim=-1)
    norm, total = expected.sum(-1), error.sum(-1)
    known = norm > 1e-6
    relative = (total / norm.clamp_min(1e-6)).sqrt() * known
    bare_norm = (norm - largest.values.sum(-1)).clamp_min(1e-6)
    bare_total = (total - error.gather(-1, largest.indices).sum(-1)).clamp_min(0)
    return relative, (bare_total / bare_norm).sqrt() * known


def layer_errors(hidden: torch.Tensor, coded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of LN(h) of each vector, as :func:`relative_errors` gives them, on its device.

    Args:
        hidden: as the LLM gave them, any float dtype, ``[R, H]``.
        coded: what a reader gets, ``[R, H]``.
    """
    import torch

    if hidden.device.type == "cpu" and coded.dtype == torch.bfloat16:
        values, bits = hidden.float().contiguous().numpy(), coded.view(torch.uint16).numpy()
        relative, bare = (np.empty(len(values), np.float32) for _ in range(2))
        largest = min(NUM_LARGEST, hidden.shape[-1] - 1)

        def measure_part(rows: slice) -> None:
            measure_errors(values[rows], bits[rows], LN_EPS, largest, relative[rows], bare[rows])

        in_parts(measure_part, len(values))
        return torch.from_numpy(relative), torch.from_numpy(bare)
    expected = layer_norm(hidden)
    return relative_errors(expected, layer_norm(coded) - expected)


@dataclass
class CodecError:
    """Relative L2 error of LN(h), gathered over a shard.

    LN is the parameter-free layer norm of routing, in float32. ``bare`` errors leave out the three
    largest channels of each vector, from error and norm alike. Vectors without any variance have
    no LN(h) and count as exact.

    Attributes:
        layers: LLM layers, in stored order; or blocks, for what they read.
    """

    layers: Sequence[int]
    counts: np.ndarray = field(init=False)
    totals: np.ndarray = field(init=False)
    largest: float = 0.0
    bare_total: float = 0.0
    bare_largest: float = 0.0

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.layers), np.int64)
        self.totals = np.zeros(len(self.layers))

    def add(self, layer: int, hidden: torch.Tensor, coded: torch.Tensor) -> None:
        """Compare hidden states of a layer (position) with what a reader gets, ``[R, H]`` both."""
        self.add_errors(layer, *layer_errors(hidden, coded))

    def add_normed(self, layer: int, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Compare vectors that are normalised already, float32 ``[R, H]`` both."""
        self.add_errors(layer, *relative_errors(expected, found - expected))

    def add_errors(self, layer: int, relative: torch.Tensor, bare: torch.Tensor) -> None:
        """Add the errors that :func:`layer_errors` gave."""
        self.counts[layer] += len(relative)
        if not len(relative):
            return
        self.totals[layer] += float(relative.sum())
        self.largest = max(self.largest, float(relative.max()))
        self.bare_total += float(bare.sum())
        self.bare_largest = max(self.bare_largest, float(bare.max()))

    def to_dict(self) -> dict[str, float]:
        """``mean``, ``max``, ``mean_without_top3``, ``max_without_top3``."""
        count = max(int(self.counts.sum()), 1)
        return {
            "mean": float(self.totals.sum()) / count,
            "max": self.largest,
            "mean_without_top3": self.bare_total / count,
            "max_without_top3": self.bare_largest,
        }

    def by_layer(self) -> dict[str, float]:
        """LLM layer -> mean error."""
        means = self.totals / np.maximum(self.counts, 1)
        return {str(layer): float(mean) for layer, mean in zip(self.layers, means, strict=True)}


def codec_error(receipts: list[Receipt]) -> dict[str, float]:
    """Error of LN(h) over all shards: means weighted by rows, maxima of maxima."""
    measured = [receipt for receipt in receipts if receipt.codec_error]
    weights = [receipt.num_rows for receipt in measured]
    return {
        name: max(values) if name.startswith("max") else float(np.average(values, weights=weights))
        for name in (measured[0].codec_error if measured else ())
        for values in [[receipt.codec_error[name] for receipt in measured]]
    }


def layer_error(receipts: list[Receipt]) -> dict[int, float]:
    """LLM layer -> mean error of LN(h) over all shards that record it, weighted by rows."""
    measured = [receipt for receipt in receipts if receipt.layer_error]
    weights = [receipt.num_rows for receipt in measured]
    return {
        int(layer): float(np.average([r.layer_error[layer] for r in measured], weights=weights))
        for layer in (measured[0].layer_error if measured else ())
    }
