"""Batches, and their way to the device."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...pipeline.store.features import Codes


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one accumulation step.

    Attributes:
        step, micro_step: which.
        position: global position of the first sample; the others follow.
        sample_ids: int64 [B].
        hidden: bfloat16 [R, L, H], rows of U unique captions, each read once; or their codes, one a
            pair of stores.
        offsets: int64 [U + 1], on the CPU.
        caption: int64 [B], index of each sample's caption among the unique ones, on the CPU.
        latents: fp32 [B, C, height, width].
        sources: int64 [B], which pair of stores each sample is of; None: all of the first.
    """

    step: int
    micro_step: int
    position: int
    sample_ids: np.ndarray
    hidden: Tensor | tuple[Codes, ...]
    offsets: Tensor
    caption: Tensor
    latents: Tensor
    sources: np.ndarray | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same with the large tensors on a device, where codes are decoded."""
        if isinstance(self.hidden, tuple):
            parts = [codes.tensor(device) for codes in self.hidden]
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            hidden = self.hidden.to(device, non_blocking=True)
        return replace(self, hidden=hidden, latents=self.latents.to(device, non_blocking=True))

    def record_stream(self, stream: Any) -> None:
        """Their memory is used on this stream too: ``torch.Tensor.record_stream``."""
        for tensor in (self.hidden, self.latents):
            if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def names(self) -> list[str]:
        """Each sample by its id, and of a mixture by its pair of stores."""
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
    """The same with each sample's caption padded to the batch's longest.

    Attributes:
        step, micro_step, position, sample_ids, latents, sources: as of :class:`Batch`.
        hidden: bfloat16 [B, T, L, H], zeros after a caption's last token.
        mask: bool [B, T], which rows are tokens.
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


Kind = TypeVar("Kind", bound=Batch | PaddedBatch)


def on_device(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Batches with their large tensors on a device: each is copied there, and decoded, while the
    one before is trained on.

    By a stream of its own, as in the notes on CUDA semantics of PyTorch's documentation: what
    trains waits for the copy, and memory is used again when both streams are done with it.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "Stream"):  # mps has none to choose from
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
