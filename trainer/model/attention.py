"""Attention by the fast kernels of PyTorch.

Shapes: B batch, N queries, T keys, A attention heads, G key/value heads, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def groups_heads(device: torch.device, dtype: torch.dtype, masked: bool) -> bool:
    """Whether a fast kernel takes grouped key/value heads: on a CPU always, on a GPU flash
    attention alone, for half precision without a mask."""
    return device.type == "cpu" or (not masked and dtype in (torch.bfloat16, torch.float16))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with grouped key/value heads: [B, A, N, E], [B, G, T, E] twice -> [B, N, A*E].

    On a GPU only flash attention groups heads, and it takes neither a mask nor float32; so keys and
    values are repeated for the kernel that takes both, which is memory-efficient attention. What
    remains would be the plain kernel, which keeps all B*A*N*T weights.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    grouped = q.shape[1] != k.shape[1]
    if grouped and not groups_heads(v.device, v.dtype, mask is not None):
        each = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(each, dim=1) for x in (k, v))  # [B, A, T, E]
        grouped = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)
