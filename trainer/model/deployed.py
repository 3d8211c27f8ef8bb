"""Baselines: how deployed models read several layers of an LLM, as strategies.

In all of them LN comes first and the projection last, as in every strategy here; where the original
model differs, the class says so.

Shapes: R rows (tokens of all captions, packed), C rows of a chunk, L layers stored, K layers read,
H text width, D blocks, A heads, E head width, M SwiGLU width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...schemas import InputError
from .fusion import in_chunks, layer_norm
from .router import Router, no_fixed_mix


class OnePerBlock(Router):
    """Block d reads one layer, as in HiDream-I1; nothing is learned.

    HiDream-I1 (``llama_layers`` of its transformer): 48 blocks, of which block d reads layer
    min(d, 32) of Llama-3.1-8B, each through a projection of its own; here a block's keys and values
    are that projection. This is the default where there are no more layers than blocks. Otherwise
    blocks read layers at equal distances, from the first stored to the last.

    Raises:
        InputError: ``chosen`` does not name one stored layer per block.
    """

    def __init__(
        self, layers: Sequence[int], num_blocks: int, chosen: Sequence[int] | None
    ) -> None:
        if chosen is None and len(layers) <= num_blocks:
            chosen = [layers[min(block, len(layers) - 1)] for block in range(num_blocks)]
        elif chosen is None:
            step = (len(layers) - 1) / max(1, num_blocks - 1)
            chosen = [layers[round(block * step)] for block in range(num_blocks)]
        if len(chosen) != num_blocks:
            raise InputError(
                f"routing.layers names {len(chosen)} layers for {num_blocks} blocks: name one per "
                "block"
            )
        super().__init__(layers, stored("one-per-block", sorted({*chosen}), layers))
        index = torch.tensor([self.layers_read.index(layer) for layer in chosen])
        one_hot = F.one_hot(torch.tensor([self.layers.index(c) for c in chosen]), len(layers))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("one_hot", one_hot.float()[None], persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("one_hot")

    def mix(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden)[:, self.get_buffer("index")]  # [R, D, H]


class Concat(Router):
    """All blocks read the same layers side by side, as in FLUX.2; only the wider projection,
    K H x H, is learned.

    FLUX.2 [dev] reads hidden states 10, 20 and 30 of the 40 layers of Mistral Small 3.1, and
    FLUX.2 [klein] 9, 18 and 27 of the 36 of Qwen3 (``hidden_states_layers`` of their pipelines):
    a quarter, a half and three quarters of the LLM, which is the default here. They project without
    LN, norm and bias.

    alpha is each layer's share of the input, 1/K.
    """

    mixes_layers = False

    def __init__(
        self, layers: Sequence[int], num_llm_layers: int, chosen: Sequence[int] | None
    ) -> None:
        if chosen is None:
            chosen = sorted({max(1, round(part * num_llm_layers / 4)) for part in (1, 2, 3)})
        super().__init__(layers, stored("concat", chosen, layers))
        self.register_buffer("shares", _shares(self), persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("shares")

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise no_fixed_mix("concat", "projects each layer with its own matrix")

    def width_read(self, text_width: int) -> int:
        return len(self.layers_read) * text_width

    def mix(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden).flatten(1)[:, None]  # [R, 1, K*H]


class LayerAttention(Router):
    """The layers of a token attend to each other and are then summed with learned weights, as in
    Krea 2; all blocks read the same sum.

    Two blocks of attention over layers (queries and keys normed, output gated by a sigmoid) and
    SwiGLU, each 5 H^2 + 3 H M + 2 H + 2 E parameters with M = 2.7 H, and K weights of any sign:
    ``layerwise_blocks`` and ``projector`` of ``Krea2TextFusion`` in diffusers, which read 12 layers
    of Qwen3-VL-4B, every third from the second; that is the default here. Krea 2 applies no LN
    before, and lets tokens attend to each other afterwards (``refiner_blocks``): a text
    transformer, which no strategy here has.

    Attention and SwiGLU start switched off and the weights at 1/K, so this starts as the mean of
    its layers. alpha is these weights.
    """

    NUM_BLOCKS = 2
    mixes_layers = False

    def __init__(
        self,
        layers: Sequence[int],
        num_llm_layers: int,
        chosen: Sequence[int] | None,
        text_width: int,
    ) -> None:
        if chosen is None:
            chosen = range(2, num_llm_layers, 3)
        super().__init__(layers, stored("attention", chosen, layers))
        self.blocks = nn.ModuleList(_FusionBlock(text_width) for _ in range(self.NUM_BLOCKS))
        self.deviation = nn.Parameter(torch.zeros(len(self.layers_read)))
        self.register_buffer("shares", _shares(self), persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """(1 + v) / K at the layers that are read: fp32 [1, 1, L]."""
        positions = [self.layers.index(layer) for layer in self.layers_read]
        index = torch.tensor(positions, device=self.deviation.device)
        deviation = self.deviation.float() / len(self.layers_read)
        return self.get_buffer("shares").index_add(-1, index, deviation[None, None])

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise no_fixed_mix("attention", "lets the layers of a token attend to each other")

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [([self.deviation], 1.0)]

    def mix(self, hidden: Tensor) -> Tensor:
        return in_chunks(self._mix, hidden)

    def _mix(self, hidden: Tensor) -> Tensor:
        x = layer_norm(hidden)  # [C, K, H]
        for block in self.blocks:
            x = block(x)  # [C, K, H]
        with torch.autocast(x.device.type, enabled=False):
            deviation = self.deviation.float() / len(self.layers_read)  # [K]
            return x.mean(1, keepdim=True) + deviation[None] @ x  # [C, 1, H]


class _FusionBlock(nn.Module):
    """Pre-normed attention over the layers of a token, then SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = math.gcd(width, 128)
        inner = 27 * width // 10
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.mlp_gate = nn.Linear(width, inner, bias=False)
        self.mlp_value = nn.Linear(width, inner, bias=False)
        self.mlp_out = nn.Linear(inner, width, bias=False)
        for module in (self.q, self.k, self.v, self.gate, self.mlp_gate, self.mlp_value):
            nn.init.xavier_uniform_(module.weight)
        for module in (self.out, self.mlp_out):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)  # [C, K, H]
        q, k, v = (self._heads(part(normed)) for part in (self.q, self.k, self.v))  # [C, A, K, E]
        q, k = (norm(y.float()).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [C, K, H]
        x = x + self.out(attended * self.gate(normed).sigmoid())
        normed = self.mlp_norm(x)  # [C, K, H]
        return x + self.mlp_out(F.silu(self.mlp_gate(normed)) * self.mlp_value(normed))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [C, A, K, E]


def _shares(router: Router) -> Tensor:
    """1/K at the layers that are read: fp32 [1, 1, L]."""
    read = torch.tensor([layer in router.layers_read for layer in router.layers])
    return (read.float() / len(router.layers_read))[None, None]


def stored(strategy: str, chosen: Sequence[int], layers: Sequence[int]) -> list[int]:
    """The layers that a strategy reads, checked to be in the store."""
    missing = sorted({*chosen} - {*layers})
    if missing or not chosen or len({*chosen}) < len(chosen):
        raise InputError(
            f"strategy {strategy} would read layers {list(chosen)}, of a store that holds "
            f"{list(layers)}: name some of these in routing.layers, each once, or extract the "
            "missing ones"
        )
    return list(chosen)
