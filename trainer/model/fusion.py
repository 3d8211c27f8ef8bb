"""Normalising and mixing layers: the arithmetic of every strategy, with its gradient.

Shapes: B batch, R rows (tokens of all captions, packed), P pairs of a batch item and a row,
L layers, H text width, D blocks, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ...schemas import LN_EPS

# Elements normalised at once: on a CPU as many as fit its caches, on a GPU 256 MiB of fp32.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def layer_norm(h: Tensor) -> Tensor:
    """Parameter-free LN over the last axis: ``(h - mean) / sqrt(var + 1e-5)``, always in fp32."""
    with torch.autocast(h.device.type, enabled=False):
        return F.layer_norm(h.float(), h.shape[-1:], eps=LN_EPS)


def fuse(
    hidden: Tensor,
    alpha: Tensor | None,
    *,
    rows: Tensor | None = None,
    owners: Tensor | None = None,
    mean: bool = True,
) -> Tensor:
    """The normalised layers of packed rows, mixed for all blocks in one product over the layers.

    It is computed as ``mean_l LN_l + (alpha - 1/L) LN``: where alpha is uniform the second term is
    exactly zero, so every strategy at zero logits gives the bits of ``uniform``, whichever matrix
    kernel its shape selects. Layers are normalised chunk by chunk and not kept, which would take
    twice the memory of the features themselves: the backward pass needs two moments per layer only.

    Args:
        hidden: [R, L, H], any float dtype, without gradient.
        alpha: None for the plain mean; [1, D or 1, L] shared by all rows; or [B, D or 1, L]
            together with ``rows`` and ``owners``.
        rows: int64 [P], the row that each pair reads.
        owners: int64 [P], the batch item whose alpha each pair uses.
        mean: add the first term. Without it, only the deviation from the plain mean is returned,
            exactly 0 where alpha is uniform.

    Returns:
        fp32 [R or P, D or 1, H].
    """
    if alpha is None:
        return _Fuse.apply(hidden, None, None, None, True)
    num_layers = hidden.shape[1]
    if alpha.shape[-1] != num_layers:
        raise ValueError(
            f"hidden states hold {num_layers} layers but alpha weighs {alpha.shape[-1]}: read "
            "the layers named by router.layers_read, in that order"
        )
    deviation = alpha.float() - 1.0 / num_layers  # [B or 1, D or 1, L], exactly 0 at uniform
    return _Fuse.apply(hidden, deviation, rows, owners, mean)


class _Fuse(torch.autograd.Function):
    """The mix in chunks; differentiable in the deviation only, since hidden states are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        deviation: Tensor | None,
        rows: Tensor | None,
        owners: Tensor | None,
        mean: bool,
    ) -> Tensor:
        num_pairs = len(hidden) if rows is None else len(rows)
        num_blocks = 1 if deviation is None else deviation.shape[1]
        out = hidden.new_empty((num_pairs, num_blocks, hidden.shape[-1]), dtype=torch.float32)
        moments = []
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, num_pairs):
                h = _take(hidden, rows, part).float()  # [C, L, H]
                normed, *of_layers = torch.native_layer_norm(h, h.shape[-1:], None, None, LN_EPS)
                moments.append(torch.stack(of_layers))  # [2, C, L, 1]
                if deviation is None:
                    out[part] = normed.mean(1, keepdim=True)  # [C, 1, H]
                    continue
                mix = (
                    deviation.expand(len(normed), -1, -1)
                    if owners is None
                    else deviation[owners[part]]
                )
                if mean:
                    center = normed.mean(1, keepdim=True)  # [C, 1, H]
                    torch.baddbmm(center, mix, normed, out=out[part])  # [C, D, H]
                else:
                    torch.bmm(mix, normed, out=out[part])  # [C, D, H]
        ctx.save_for_backward(hidden, deviation, rows, owners, torch.cat(moments, dim=1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        hidden, deviation, rows, owners, moments = ctx.saved_tensors
        if deviation is None:
            return None, None, None, None, None
        total = torch.zeros_like(deviation)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, len(grad)):
                # grad . LN(h) = scale (grad . h - mean sum(grad)): no normalised layer is needed.
                h = _take(hidden, rows, part).float()  # [C, L, H]
                mean, scale = moments[:, part].mT  # [C, 1, L] each
                products = torch.bmm(grad[part], h.mT)  # [C, D, L]
                each = scale * (products - mean * grad[part].sum(-1, keepdim=True))  # [C, D, L]
                if owners is None:
                    total[0] += each.sum(0)
                else:
                    total.index_add_(0, owners[part], each)
        return None, total, None, None, None


def _chunks(hidden: Tensor, num_pairs: int) -> list[slice]:
    elements = _CHUNK_ELEMENTS.get(hidden.device.type, _CHUNK_ELEMENTS["cuda"])
    step = max(1, elements // (hidden.shape[1] * hidden.shape[2]))
    return [slice(start, min(start + step, num_pairs)) for start in range(0, num_pairs, step)]


def _take(hidden: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    return hidden[part] if rows is None else hidden.index_select(0, rows[part])


def in_chunks(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """``function`` chunk by chunk, joined: [C, L, H] -> [C, ...] for all of [R, L, H].

    Intermediate results of a chunk are recomputed in the backward pass, not kept.
    """
    parts = [
        checkpoint(function, hidden[part], use_reentrant=False, preserve_rng_state=False)
        for part in _chunks(hidden, len(hidden))
    ]
    return torch.cat(parts)
