"""The trial of packing: whether an LLM gives a caption among others in its line what it gives it
alone."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import InputError

if TYPE_CHECKING:
    import torch

    from .llm import Encoder


NUM_CAPTIONS = 12
"""Captions that are enough for a trial, though some may not be finite."""
NUM_TRIED = 3
"""The one in the middle has neighbours on both sides."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Of the mean relative error of a layer's rows against those of the caption alone. Of SmolLM2-135M
rounding alone makes it 2e-7 and 5e-3."""


class PackingError(InputError):
    """Captions that stand in one line of a batch are not kept apart."""


def supports_packing(encoder: "Encoder", sequences: Sequence[np.ndarray]) -> bool:
    """Try it: on a line of captions whose neighbours change, and against the caption alone.

    A neighbour's words must not change a bit, as the shapes are the same; positions must begin anew
    with each caption, which only rounding may show.

    Args:
        sequences: token ids of some captions, template included. The first three that alone give
            finite hidden states are used; where there is none the answer is no.
    """
    import torch

    if not encoder.takes_positions:
        return False
    usable = [*islice((s for s in sequences if _is_finite(_rows(encoder, [s], [0]))), NUM_TRIED)]
    if not usable:
        return False
    tried, before, after = (usable[i % len(usable)] for i in range(NUM_TRIED))
    # Other words in the same places: the caption's own, backwards.
    others = [np.resize(tried[::-1], len(each)) for each in (before, after)]
    line = [0, 0, 0, 1, 1, 1]
    among = _rows(encoder, [before, tried, after, after, tried, before], line)
    among_others = _rows(encoder, [others[0], tried, others[1], others[1], tried, others[0]], line)
    alone = _rows(encoder, [tried], [0])
    for start in (len(before), len(before) + len(tried) + 2 * len(after)):
        place = slice(start, start + len(tried))
        for here, there, expected in zip(among, among_others, alone, strict=True):
            if not torch.equal(here[place], there[place]):
                return False
            error = (here[place] - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
            if not error.mean() <= TOLERANCE[str(expected.dtype).removeprefix("torch.")]:
                return False
    return True


def check_packing(encoder: "Encoder", sequences: Sequence[np.ndarray]) -> None:
    """In a worker of a store whose captions are packed.

    Raises:
        PackingError: this machine's kernels do not keep captions apart, as those where the store
            was begun did.
    """
    if not supports_packing(encoder, sequences):
        raise PackingError(
            f"on {encoder.device} the LLM does not keep captions apart that stand in one line of "
            "a batch, as it did where the store was begun, or gives nothing finite: take such a "
            "machine for all workers, or make a new store with --batching padded"
        )


def _is_finite(layers: "list[torch.Tensor]") -> bool:
    return all(bool(rows.isfinite().all()) for rows in layers)


def _rows(
    encoder: "Encoder", sequences: Sequence[np.ndarray], line: Sequence[int]
) -> "list[torch.Tensor]":
    """Of each layer, ``[rows of all sequences, H]``."""
    found: list[torch.Tensor] = []
    encoder.encode(
        sequences, [0] * len(sequences), lambda _, hidden: found.append(hidden.clone()), line
    )
    return found
