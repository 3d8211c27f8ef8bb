"""Rotary positions whose frequencies depend on the length of a sequence, computed for each caption.

With dynamic NTK scaling and longrope, transformers takes the longest position of a batch for the
length of all of its sequences, and dynamic scaling remembers that of batches before.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


def separate_captions(model: Any) -> "list[CaptionRope]":
    """Replace such rotary positions of a model by those of each sequence alone.

    Returns:
        What was put in their place; none for most models.
    """
    ropes = []
    for name, module in [*model.named_modules()]:
        if depends_on_length(module):
            parent, _, child = name.rpartition(".")
            ropes.append(CaptionRope(module))
            setattr(model.get_submodule(parent), child, ropes[-1])
    return ropes


def depends_on_length(module: Any) -> bool:
    """Whether rotary positions depend on the length of a sequence."""
    types = getattr(module, "rope_type", None)
    names = types.values() if isinstance(types, dict) else [types]
    return any(isinstance(n, str) and ("dynamic" in n or n == "longrope") for n in names)


def token_lengths(
    sequences: Sequence[np.ndarray], row: Sequence[int] | np.ndarray, shape: torch.Size
) -> torch.Tensor:
    """Length of the sequence that each token of a batch belongs to, int64 ``[B, T]``; 1 for
    padding."""
    lengths = torch.ones(shape, dtype=torch.long)
    ends = dict.fromkeys(np.asarray(row).tolist(), 0)
    for r, sequence in zip(np.asarray(row).tolist(), sequences, strict=True):
        start = ends[r]
        ends[r] = start + len(sequence)
        lengths[r, start : ends[r]] = len(sequence)
    return lengths


class CaptionRope(torch.nn.Module):
    """Rotary positions of each sequence as they are when it is alone.

    Tokens of sequences of one length are given to a fresh copy of the module together, and with
    them the last position of such a sequence, from which it takes the length.

    Args:
        rope: of transformers: ``(x, position_ids, ...) -> cos, sin``.

    Attributes:
        lengths: length of each token's sequence in the next batch, int64 ``[B, T]``; None: a row
            is as long as its last position says.
    """

    def __init__(self, rope: torch.nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self.lengths: torch.Tensor | None = None
        self._shortest = min(_thresholds(rope), default=1)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine ``[..., B, T, D]`` for positions ``[..., B, T]``."""
        lengths = self.lengths
        if lengths is None:
            lengths = (position_ids.amax(-1, keepdim=True) + 1).expand_as(position_ids)
            lengths = lengths.flatten(0, -3)[0] if lengths.ndim > 2 else lengths
        lengths = lengths.to(position_ids.device)
        positions = position_ids.expand(*position_ids.shape[:-2], *lengths.shape)
        positions = positions.minimum(lengths - 1)  # those of padding reach further
        lengths = lengths.clamp(min=self._shortest)
        found: list[torch.Tensor] = []
        for length in lengths.unique().tolist():
            chosen = lengths == length
            own = positions[..., chosen].unsqueeze(-2)  # [..., 1, tokens]
            last = torch.full_like(own[..., :1], length - 1)
            outputs = self._fresh()(x, torch.cat([own, last], -1), *args, **kwargs)
            for index, values in enumerate(outputs):  # [..., 1, tokens + 1, D]
                if len(found) <= index:
                    shape = (*values.shape[:-3], *lengths.shape, values.shape[-1])
                    found.append(values.new_empty(shape))
                found[index][..., chosen, :] = values[..., 0, :-1, :]
        cos, sin = found
        return cos, sin

    def _fresh(self) -> torch.nn.Module:
        """The module as it was loaded; its configuration is shared."""
        config = getattr(self.rope, "config", None)
        return copy.deepcopy(self.rope, {id(config): config})


def _thresholds(rope: torch.nn.Module) -> Iterator[int]:
    """Lengths up to which the frequencies are the same."""
    yield from filter(None, [getattr(rope, "original_max_seq_len", None)])
    parameters = getattr(rope.config, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        if isinstance(each, dict) and (value := each.get("original_max_position_embeddings")):
            yield int(value)
