"""Deep fusion: blocks attend to the LLM's own keys and values, layer by layer (arXiv 2505.10046).

Text does not see the image, so the LLM's keys and values are its frozen norms and projections of
the hidden states that enter each of its blocks. Those are stored; the weights are copied from it.

Shapes: R rows (tokens of all captions, packed), U captions, K layers read, L layers stored,
H text width, D blocks, G key/value heads, E head width of the LLM.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...schemas import InputError, LlmAttention
from .deployed import stored
from .router import Router, no_fixed_mix


class DeepFusion(Router):
    """Block d reads the keys and values of one block of the LLM; nothing is learned.

    As in the comparison of arXiv 2602.03510, whose 24 blocks share the attention of blocks 7 to 30
    of the 36 of Qwen3-VL-4B: as many blocks of the LLM are left out at its end as at its start, at
    most a sixth of them each, and the blocks of the DiT are spread evenly over the others.

    Args:
        layers: LLM layers in the feature store.
        attention: shapes of the LLM's keys and values. Their weights are zero until they are
            loaded, and do not learn.
        num_llm_layers: number of blocks of the LLM.
        num_blocks: D.
        chosen: the layer of each block; by default as above.
        text_width: H.

    Raises:
        InputError: layers that are not stored, or that enter no block of the LLM.
    """

    mixes_layers = False
    needs_positions = True

    def __init__(
        self,
        layers: Sequence[int],
        attention: LlmAttention,
        num_llm_layers: int,
        num_blocks: int,
        chosen: Sequence[int] | None,
        text_width: int,
    ) -> None:
        chosen = layers_of_blocks(layers, num_llm_layers, num_blocks, chosen)
        super().__init__(layers, sorted({*chosen}))
        self.attention = attention
        num, heads, width = len(self.layers_read), attention.num_kv_heads, attention.head_dim
        shapes = {
            "norm": (num, text_width),
            "weight": (num, 2 * heads * width, text_width),
            "frequencies": (num, width // 2),
            "scale": (num, 1),
        }
        if attention.bias:
            shapes["bias"] = (num, 2 * heads * width)
        if attention.key_norm:
            shapes["key_norm"] = (num, width)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        index = torch.tensor([self.layers_read.index(layer) for layer in chosen])
        one_hot = F.one_hot(torch.tensor([self.layers.index(c) for c in chosen]), len(self.layers))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("one_hot", one_hot.float()[None], persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """1 at the layer whose keys and values a block reads: fp32 [1, D, L]."""
        return self.get_buffer("one_hot")

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise no_fixed_mix("deep-fusion", "reads the LLM's own keys and values")

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

    def width_read(self, text_width: int) -> int:
        return 2 * self.attention.num_kv_heads * self.attention.head_dim

    def positions(self, offsets: Tensor, null: Tensor | None) -> Tensor:
        """Position of each row's token in its sequence, int64 [R].

        Args:
            offsets: int64 [U + 1], where captions begin and end.
            null: bool [U], whether each is the null caption, all of whose tokens are stored.
        """
        # Two captions of 2 and 3 tokens behind a prefix of one, and the null caption, one token:
        #
        #     offsets  0 2 5 6     positions  1 2  1 2 3  0
        lengths = offsets.diff()  # [U]
        first = torch.full_like(lengths, self.attention.first_position)
        if null is not None:
            first = first.masked_fill(null.to(first.device), 0)
        rows = torch.arange(int(offsets[-1]), device=offsets.device)
        return rows + (first - offsets[:-1]).repeat_interleave(lengths)

    def mix(self, hidden: Tensor) -> Tensor:
        """The keys, before rotary positions, and the values of each block's layer, side by side:
        [R, K, H] -> [R, D, 2*G*E]."""
        return self._by_block(torch.stack([*self._layers(hidden)], 1))

    def keys_and_values(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Keys and values of each block as the LLM has them, side by side: [R, D, 2*G*E].

        Args:
            hidden: [R, K, H], the layers in the order of ``layers_read``.
            positions: int64 [R], of each token in its sequence.
        """
        self._check_layers(hidden)
        rotated = []
        for number, both in enumerate(self._layers(hidden)):
            frequencies, scale = self._weight("frequencies", number), self._weight("scale", number)
            angles = positions[:, None, None] * frequencies  # [R, 1, E/2]
            cos, sin = angles.cos() * scale, angles.sin() * scale
            keys, values = both.chunk(2, dim=-1)  # [R, G*E] each
            first, second = self._heads(keys).float().chunk(2, dim=-1)  # [R, G, E/2] each
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
            rotated.append(torch.cat([turned.flatten(1).to(values.dtype), values], dim=-1))
        return self._by_block(torch.stack(rotated, 1))

    def _layers(self, hidden: Tensor) -> list[Tensor]:
        """The keys, before rotary positions, and values of each layer: [R, 2*G*E] each."""
        both = []
        eps = self.attention.eps
        for number, layer in enumerate(hidden.unbind(1)):
            normed = F.rms_norm(layer.float(), layer.shape[-1:], self._weight("norm", number), eps)
            bias = self._weight("bias", number) if self.attention.bias else None
            out = F.linear(normed, self._weight("weight", number), bias)  # [R, 2*G*E]
            if self.attention.key_norm:
                keys, values = out.chunk(2, dim=-1)
                weight = self._weight("key_norm", number)
                keys = F.rms_norm(self._heads(keys).float(), weight.shape, weight, eps)
                out = torch.cat([keys.flatten(1).to(values.dtype), values], dim=-1)
            both.append(out)
        return both

    def _weight(self, name: str, number: int) -> Tensor:
        return self.get_parameter(name)[number]

    def _heads(self, keys: Tensor) -> Tensor:
        return keys.unflatten(-1, (-1, self.attention.head_dim))  # [R, G, E]

    def _by_block(self, both: Tensor) -> Tensor:
        return both.index_select(1, self.get_buffer("index"))  # [R, K, 2*G*E] -> [R, D, 2*G*E]


def layers_of_blocks(
    layers: Sequence[int], num_llm_layers: int, num_blocks: int, chosen: Sequence[int] | None
) -> list[int]:
    """The stored layer that each block of the DiT reads with deep fusion; see :class:`DeepFusion`.

    Raises:
        InputError: it is not stored, or enters no block of the LLM; or not one for each block.
    """
    if chosen is None:
        left_out = max(0, min(num_llm_layers // 6, (num_llm_layers - num_blocks) // 2))
        step = (num_llm_layers - 1 - 2 * left_out) / max(1, num_blocks - 1)
        chosen = [left_out + round(block * step) for block in range(num_blocks)]
    if len(chosen) != num_blocks:
        raise InputError(
            f"routing.layers names {len(chosen)} layers for {num_blocks} blocks: name one per block"
        )
    if max(chosen) >= num_llm_layers:
        raise InputError(
            f"strategy deep-fusion would read layer {max(chosen)}, which no block of an LLM of "
            f"{num_llm_layers} reads: name layers from 0 to {num_llm_layers - 1} in routing.layers"
        )
    stored("deep-fusion", sorted({*chosen}), layers)
    return list(chosen)
