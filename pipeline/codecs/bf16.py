"""bfloat16 as it is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .base import U2, ArraySpec, CodeArrays, Codec, Coded, Layers

if TYPE_CHECKING:
    import torch


class Bf16(Codec):
    """bfloat16, stored as its bits in uint16: rounding to nearest even is the only loss.

    Never float16: hidden states of real LLMs exceed its largest value, 65,504.
    """

    name = "bf16"
    aligned = False

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        return (ArraySpec("hidden", U2, self.width, None, "bits of bfloat16"),)

    def encode(self, layer: int, hidden: torch.Tensor, below: Coded | None) -> Coded:
        import torch

        rounded = hidden.to(torch.bfloat16)
        return Coded({"hidden": rounded.view(torch.uint16)}, rounded)

    def decode(
        self, codes: CodeArrays, layers: Layers, targets: np.ndarray, out: np.ndarray
    ) -> None:
        out[targets] = codes["hidden"][:, list(layers)]

    def decode_torch(self, codes: Mapping[str, torch.Tensor], layers: Layers) -> torch.Tensor:
        import torch

        bits = codes["hidden"].view(torch.bfloat16)
        return bits if list(layers) == list(range(bits.shape[1])) else bits[:, list(layers)]
