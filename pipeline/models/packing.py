"""Trial of packing: does an LLM give a caption among others the hidden states it has alone?"""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from ...schemas import InputError

if TYPE_CHECKING:
    import torch

    from .llm import Encoder


NUM_CAPTIONS = 12
"""Captions that are enough for a trial, even if some are not finite."""
NUM_TRIED = 3
"""Captions packed into a row: the one in the middle has neighbours on both sides."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest mean relative error of a layer's rows against those of the caption alone, by dtype. For
SmolLM2-135M rounding alone makes it 2e-7 and 5e-3."""


class PackingError(InputError):
    """An LLM does not keep captions apart that share a row of a batch."""


def supports_packing(encoder: "Encoder", sequences: Sequence[np.ndarray]) -> bool:
    """Try if the LLM keeps packed captions apart.

    Caption t stands between neighbours b and a, and again between others of the same lengths::

        row 0    b t a         row 0    b' t a'
        row 1    a t b         row 1    a' t b'

    The words of its neighbours must not change a bit of t, as shapes are the same. Against t alone
    only rounding may differ, which shows that positions start anew with each caption.

    Args:
        sequences: token ids of some captions, template included. The first three whose hidden
            states are finite when they are alone are used; where there is none the answer is no.
    """
    import torch

    if not encoder.takes_positions:
        return False
    usable = [*islice((s for s in sequences if _is_finite(_rows(encoder, [s], [0]))), NUM_TRIED)]
    if not usable:
        return False
    tried, before, after = (usable[i % len(usable)] for i in range(NUM_TRIED))
    # Other words in the same positions: the caption's own, backwards.
    others = [np.resize(tried[::-1], len(each)) for each in (before, after)]
    row = [0, 0, 0, 1, 1, 1]
    one = _rows(encoder, [before, tried, after, after, tried, before], row)
    other = _rows(encoder, [others[0], tried, others[1], others[1], tried, others[0]], row)
    alone = _rows(encoder, [tried], [0])
    for start in (len(before), len(before) + len(tried) + 2 * len(after)):
        part = slice(start, start + len(tried))
        for found, again, expected in zip(one, other, alone, strict=True):
            if not torch.equal(found[part], again[part]):
                return False
            error = (found[part] - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
            if not error.mean() <= TOLERANCE[str(expected.dtype).removeprefix("torch.")]:
                return False
    return True


def check_packing(encoder: "Encoder", sequences: Sequence[np.ndarray]) -> None:
    """Check a worker of a store whose captions are packed.

    Raises:
        PackingError: this machine's kernels do not keep captions apart, unlike those of the machine
            where the store was begun.
    """
    if not supports_packing(encoder, sequences):
        raise PackingError(
            f"on {encoder.device} the LLM does not keep captions apart that share a row of a "
            "batch, as it did where the store was begun, or gives nothing finite: use machines of "
            "that kind for all workers, or make a new store with --batching padded"
        )


def _is_finite(layers: "list[torch.Tensor]") -> bool:
    return all(bool(rows.isfinite().all()) for rows in layers)


def _rows(
    encoder: "Encoder", sequences: Sequence[np.ndarray], row: Sequence[int]
) -> "list[torch.Tensor]":
    """Hidden states of each layer, ``[tokens of all sequences, H]``."""
    layers: list[torch.Tensor] = []
    encoder.encode(
        sequences, [0] * len(sequences), lambda _, hidden: layers.append(hidden.clone()), row
    )
    return layers
