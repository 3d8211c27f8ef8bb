"""Hidden states <-> codes, and the error that this makes. Arithmetic only, no storage.

A codec's codes are arrays of standard Zarr types, so that any Zarr implementation reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    import torch

LN_EPS = 1e-5
"""Of the parameter-free layer norm that routing applies (arXiv 2602.03510, reference code)."""
NUM_LARGEST = 3
"""Channels left out of the second pair of errors: massive activations hide all others."""


@dataclass(frozen=True)
class Bf16:
    """bfloat16, stored as its bits in uint16: rounding to nearest even is the only loss.

    Never float16: hidden states of real LLMs exceed its largest value, 65,504.
    """

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[np.dtype] = np.dtype("<u2")

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states of any float dtype and shape -> their bfloat16 bits, uint16."""
        import torch

        return hidden.to(torch.bfloat16).view(torch.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes uint16 of any shape -> float32 of that shape, exactly."""
        return (codes.astype(np.uint32) << 16).view(np.float32)

    def decode_torch(self, codes: np.ndarray) -> torch.Tensor:
        """Codes uint16 -> bfloat16 tensor that shares their memory (which must be writable)."""
        import torch

        return torch.from_numpy(codes).view(torch.bfloat16)


@dataclass
class CodecError:
    """Relative L2 error of LN(h) per row and layer, gathered over a shard.

    LN is the parameter-free layer norm of routing, in float32. ``bare`` leaves out the three
    largest channels of each vector, from error and norm alike.
    """

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    bare_total: float = 0.0
    bare_largest: float = 0.0

    def add(self, hidden: torch.Tensor, coded: torch.Tensor) -> None:
        """Compare hidden states with what a reader will get, both float ``[rows, H]``."""
        import torch

        self.count += hidden.shape[0]
        if hidden.dtype == coded.dtype:
            return
        width = hidden.shape[-1:]
        expected = torch.nn.functional.layer_norm(hidden.float(), width, eps=LN_EPS)
        error = torch.nn.functional.layer_norm(coded.float(), width, eps=LN_EPS) - expected
        expected, error = expected.square(), error.square()
        largest = expected.topk(min(NUM_LARGEST, width[0] - 1), dim=-1)
        relative = (error.sum(-1) / expected.sum(-1).clamp_min(1e-30)).sqrt()
        bare_norm = (expected.sum(-1) - largest.values.sum(-1)).clamp_min(1e-30)
        bare_error = (error.sum(-1) - error.gather(-1, largest.indices).sum(-1)).clamp_min(0)
        bare = (bare_error / bare_norm).sqrt()
        self.total += float(relative.sum())
        self.largest = max(self.largest, float(relative.max()))
        self.bare_total += float(bare.sum())
        self.bare_largest = max(self.bare_largest, float(bare.max()))

    def to_dict(self) -> dict[str, float]:
        """``mean``, ``max``, ``mean_without_top3``, ``max_without_top3``."""
        count = max(self.count, 1)
        return {
            "mean": self.total / count,
            "max": self.largest,
            "mean_without_top3": self.bare_total / count,
            "max_without_top3": self.bare_largest,
        }


CODECS = {codec.name: codec for codec in (Bf16(),)}
