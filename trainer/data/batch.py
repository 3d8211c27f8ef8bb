"""Batches of features and latents, and their transfer to the device.

Shapes: B batch (of one rank and accumulation step), R rows (tokens of all captions, packed),
U unique captions, T tokens of the longest caption, L layers, H text width, C channels.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...schemas import MASK, NULL
from ..diffusion.noise import Draws

if TYPE_CHECKING:
    from ...pipeline.store.features import Codes


ON_CPU = (MASK, NULL)
"""Tensors of captions that are read on the CPU."""


@dataclass(frozen=True)
class Batch:
    """Training data of one rank for one accumulation step: packed captions, each read once.

    Three samples of two captions, of 3 and 5 rows::

        sample_ids    7   3   9
        caption       1   0   1         of each sample, among the unique ones
        offsets       0   3       8     caption 0 is rows 0 to 3 of hidden, caption 1 is 3 to 8

    Attributes:
        step, micro_step: step, and accumulation step within it.
        position: global position of the first sample; the others follow.
        sample_ids: int64 [B].
        hidden: bfloat16 [R, L, H], rows of U unique captions; or their codes, one entry per pair of
            stores.
        offsets: int64 [U + 1], on the CPU.
        caption: int64 [B], index of each sample's caption among the unique ones, on the CPU.
        latents: fp32 [B, C, height, width].
        sources: int64 [B], number of the pair of stores that each sample is from; None: the first.
        conditioning: what the pipeline of a pretrained network gives it for the unique captions, by
            name, [U, ...]; or ``null``, which of them is the null caption. None: nothing is needed.
            Their ``mask`` and ``null`` stay on the CPU.
        draws: t and noise of B*K rows; None: the loader draws none.
    """

    step: int
    micro_step: int
    position: int
    sample_ids: np.ndarray
    hidden: "Tensor | tuple[Codes, ...]"
    offsets: Tensor
    caption: Tensor
    latents: Tensor
    sources: np.ndarray | None = None
    conditioning: Mapping[str, Tensor] | None = None
    draws: Draws | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its large tensors on a device, where codes are decoded."""
        if isinstance(self.hidden, tuple):
            parts = [codes.tensor(device) for codes in self.hidden]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            hidden = self.hidden.to(device, non_blocking=True)
        given = self.conditioning
        if given is not None:
            given = {
                name: value if name in ON_CPU else value.to(device, non_blocking=True)
                for name, value in given.items()
            }
        latents = self.latents.to(device, non_blocking=True)
        draws = None if self.draws is None else self.draws.to(device)
        return replace(self, hidden=hidden, latents=latents, conditioning=given, draws=draws)

    def record_stream(self, stream: Any) -> None:
        """Mark the tensors as used on a stream: ``torch.Tensor.record_stream``."""
        drawn = () if self.draws is None else self.draws.tensors()
        for tensor in (self.hidden, self.latents, *drawn, *(self.conditioning or {}).values()):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def names(self) -> list[str]:
        """Each sample by its id; in a mixture, by its pair of stores and its id."""
        if self.sources is None:
            return [str(sample) for sample in self.sample_ids.tolist()]
        both = zip(self.sources.tolist(), self.sample_ids.tolist(), strict=True)
        return [f"{source}:{sample}" for source, sample in both]

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.offsets[-1])


@dataclass(frozen=True)
class PaddedBatch:
    """The same with each sample's caption padded to the longest in the batch.

    Attributes:
        step, micro_step, position, sample_ids, latents, sources: as for :class:`Batch`.
        hidden: bfloat16 [B, T, L, H], zeros after a caption's last token.
        mask: bool [B, T], True for rows that are tokens.
    """

    step: int
    micro_step: int
    position: int
    sample_ids: np.ndarray
    hidden: Tensor
    mask: Tensor
    latents: Tensor
    sources: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """Rows that are tokens."""
        return int(self.mask.sum())


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Batches with their large tensors on a device: each is copied there, and decoded, while
    training uses the previous one.

    The copy has a stream of its own, as in the notes on CUDA semantics of PyTorch's documentation:
    training waits for the copy, and memory is reused once both streams are done with it.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "Stream"):  # mps has one stream only
        yield from (batch.to(device) for batch in batches)
        return
    copying = module.Stream()

    def copy() -> Batch:
        with module.stream(copying):
            return next(batches).to(device)

    ahead = copy()
    while True:
        batch, training = ahead, module.current_stream()
        training.wait_stream(copying)
        batch.record_stream(training)
        ahead = copy()
        yield batch
