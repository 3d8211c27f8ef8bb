"""Sizes and parts of the diffusion transformer: norm, rotary positions, attention, blocks.

Shapes: B batch, N image tokens, W width, T text tokens of the longest caption, H text width,
A attention heads, G key/value heads, E head width, M SwiGLU width.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...schemas import InputError, ModelConfig
from .attention import attend
from .gates import phi

ROPE_THETA = 1e4
RMS_EPS = 1e-6
T_SCALE = 1000.0


# ----------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Size:
    """Dimensions of a DiT. ``ModelConfig`` may replace single numbers of a named size."""

    depth: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int


SIZES = {
    "nano": Size(depth=6, width=96, num_heads=4, num_kv_heads=1, head_dim=24, mlp_width=256),
    "small": Size(depth=12, width=384, num_heads=8, num_kv_heads=2, head_dim=64, mlp_width=1536),
    "base": Size(depth=12, width=768, num_heads=12, num_kv_heads=3, head_dim=64, mlp_width=3072),
    "paper": Size(depth=24, width=2048, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=8192),
}


def resolve_size(config: ModelConfig) -> Size:
    """The named size with the numbers that the configuration replaces.

    Raises:
        InputError: heads that cannot be grouped, or a head_dim that 2D RoPE cannot split.
    """
    names = ("depth", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    size = replace(SIZES[config.size], **given)
    check_heads(size)
    return size


def check_heads(size: Size) -> None:
    """Refuse heads that cannot be grouped, or that 2D RoPE cannot split.

    Raises:
        InputError: with the key of the configuration.
    """
    if size.num_heads % size.num_kv_heads:
        raise InputError(
            f"model.num_heads {size.num_heads} is not a multiple of model.num_kv_heads "
            f"{size.num_kv_heads}: each key/value head serves the same number of query heads"
        )
    if size.head_dim % 4:
        raise InputError(
            f"model.head_dim {size.head_dim} is not divisible by 4: 2D rotary positions turn pairs "
            "of channels, half of them by the row and half by the column"
        )


# ----------------------------------------------------------------------------------------- parts


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, always in fp32, also under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=RMS_EPS)

    def scale(self, x: Tensor) -> Tensor:
        """1 / rms(x): [..., W] -> fp32 [..., 1]."""
        norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        return (norm.square() / x.shape[-1] + RMS_EPS).rsqrt()


class RotaryPositions(nn.Module):
    """2D RoPE: half of the channel pairs rotate with the row of the patch, half with its column."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4)
        self.register_buffer("frequencies", ROPE_THETA**-exponents, persistent=False)  # [E/4]

    def forward(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a grid of patches, row by row: fp32 [N, E/2] each."""
        frequencies = self.get_buffer("frequencies")
        row, column = torch.meshgrid(
            torch.arange(rows, dtype=torch.float32, device=frequencies.device),
            torch.arange(columns, dtype=torch.float32, device=frequencies.device),
            indexing="ij",
        )
        position = torch.stack([row.flatten(), column.flatten()], dim=1)  # [N, 2]
        angles = (position[:, :, None] * frequencies).flatten(1)  # [N, E/2]
        return angles.cos(), angles.sin()


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, as returned by :class:`RotaryPositions`."""


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys rotated by their positions: [B, A, N, E]."""
    cos, sin = rotary  # [N, E/2]
    first, second = x.chunk(2, dim=-1)  # [B, A, N, E/2] each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, N, A*E] -> [B, A, N, E]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class ImageAttention(nn.Module):
    """Queries, keys and values of image tokens, with 2D rotary positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        inner, kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        self.q = nn.Linear(size.width, inner, bias=False)
        self.k = nn.Linear(size.width, kv, bias=False)
        self.v = nn.Linear(size.width, kv, bias=False)
        self.out = nn.Linear(inner, size.width, bias=False)
        self.q_norm = RMSNorm(size.head_dim)
        self.k_norm = RMSNorm(size.head_dim)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: [B, N, W] -> [B, A, N, E] and [B, G, N, E] twice."""
        q = rotate(self.q_norm(heads(self.q(x), self.head_dim)), rotary)  # [B, A, N, E]
        k = rotate(self.k_norm(heads(self.k(x), self.head_dim)), rotary)  # [B, G, N, E]
        return q, k, heads(self.v(x), self.head_dim)  # [B, G, N, E]


class SelfAttention(ImageAttention):
    """Image tokens attend to each other."""

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return self.out(attend(*self.project(x, rotary)))  # [B, N, W]


class CrossAttention(nn.Module):
    """Image tokens attend to text. Keys and values do not depend on the image: see
    ``DiT.encode_text``."""

    def __init__(self, size: Size, text_width: int) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        inner, kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
        self.q = nn.Linear(size.width, inner, bias=False)
        self.text_k = nn.Linear(text_width, kv, bias=False)
        self.text_v = nn.Linear(text_width, kv, bias=False)
        self.out = nn.Linear(inner, size.width, bias=False)
        self.q_norm = RMSNorm(size.head_dim)
        self.k_norm = RMSNorm(size.head_dim)

    def read_weights(self) -> Tensor:
        """Weights that turn projected text into keys and values, stacked: [2*G*E, H]."""
        return torch.cat([self.text_k.weight, self.text_v.weight])

    def read(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, from text multiplied with :meth:`read_weights`: [B, T, 2*G*E] ->
        [B, G, T, E] each."""
        k, v = (heads(part, self.head_dim) for part in both.chunk(2, dim=-1))  # [B, G, T, E] each
        return self.k_norm(k).to(v.dtype), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q_norm(heads(self.q(x), self.head_dim))  # [B, A, N, E]
        return self.out(attend(q, k, v, mask))  # [B, N, W]


class JointAttention(ImageAttention):
    """Image tokens attend to each other and to text, in one softmax (deep fusion, arXiv
    2505.10046).

    Keys and values of text are the LLM's own, whose heads these are. Image tokens have 2D rotary
    positions, queries for text too; keys of text have those of the LLM.
    """

    def read(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of text, which stand side by side: [B, T, 2*G*E] -> [B, G, T, E] each."""
        k, v = (heads(part, self.head_dim) for part in both.chunk(2, dim=-1))
        return k, v

    def forward(
        self, x: Tensor, rotary: Rotary, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        q, own_k, own_v = self.project(x, rotary)
        k = torch.cat([k.to(own_v.dtype), own_k.to(own_v.dtype)], dim=2)  # [B, G, T + N, E]
        v = torch.cat([v.to(own_v.dtype), own_v], dim=2)  # [B, G, T + N, E]
        if mask is not None:
            mask = F.pad(mask, (0, x.shape[1]), value=True)  # [B, 1, 1, T + N]
        return self.out(attend(q, k, v, mask))  # [B, N, W]


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * value(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate = nn.Linear(size.width, size.mlp_width, bias=False)
        self.value = nn.Linear(size.width, size.mlp_width, bias=False)
        self.out = nn.Linear(size.mlp_width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.value(x))  # [B, N, W] -> [B, N, M] -> [B, N, W]


class NoiseEmbedder(nn.Module):
    """t -> the vector that adaLN modulates by."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(phi(t, T_SCALE))  # [B] -> [B, 128] -> [B, W]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift  # [B, N, W], [B, 1, W] twice


class TextBlock(nn.Module):
    """A block: image tokens are mixed, text is read, then SwiGLU. Subclasses make the parts.

    Attributes:
        modulation: makes shifts, scales and gates of the vector of :class:`NoiseEmbedder`, or None.
    """

    self_norm: RMSNorm
    mlp_norm: RMSNorm
    mlp: SwiGLU
    modulation: nn.Linear | None

    @abstractmethod
    def mix(self, x: Tensor, rotary: Rotary, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What is added to the image tokens, from them normed: [B, N, W] -> [B, N, W]."""

    def add_text(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Image tokens that have read text, unless :meth:`mix` reads it: [B, N, W] -> [B, N, W]."""
        return x

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None,
        rotary: Rotary,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        if self.modulation is None or noise is None:
            x = x + self.mix(self.self_norm(x), rotary, k, v, mask)  # [B, N, W]
            x = self.add_text(x, k, v, mask)
            return x + self.mlp(self.mlp_norm(x))  # [B, N, W]
        chunks = self.modulation(F.silu(noise))[:, None].float().chunk(6, dim=-1)  # [B, 1, W] each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
        normed = modulate(self.self_norm(x), shift_a, scale_a)
        x = x + gate_a * self.mix(normed, rotary, k, v, mask)  # [B, N, W]
        x = self.add_text(x, k, v, mask)
        return x + gate_m * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))  # [B, N, W]


class Block(TextBlock):
    """Self-attention, cross-attention, SwiGLU. The query of cross-attention is not pre-normed."""

    def __init__(self, size: Size, text_width: int, conditioned: bool) -> None:
        super().__init__()
        self.self_norm = RMSNorm(size.width)
        self.self_attention = SelfAttention(size)
        self.cross_attention = CrossAttention(size, text_width)
        self.mlp_norm = RMSNorm(size.width)
        self.mlp = SwiGLU(size)
        self.modulation = nn.Linear(size.width, 6 * size.width) if conditioned else None

    @property
    def reader(self) -> CrossAttention:
        """The part that reads text."""
        return self.cross_attention

    def mix(self, x: Tensor, rotary: Rotary, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.self_attention(x, rotary)

    def add_text(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return x + self.cross_attention(x, k, v, mask)


class JointBlock(TextBlock):
    """Joint attention with the LLM's keys and values, then SwiGLU."""

    def __init__(self, size: Size, conditioned: bool) -> None:
        super().__init__()
        self.self_norm = RMSNorm(size.width)
        self.attention = JointAttention(size)
        self.mlp_norm = RMSNorm(size.width)
        self.mlp = SwiGLU(size)
        self.modulation = nn.Linear(size.width, 6 * size.width) if conditioned else None

    @property
    def reader(self) -> JointAttention:
        """The part that reads text."""
        return self.attention

    def mix(self, x: Tensor, rotary: Rotary, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.attention(x, rotary, k, v, mask)
