"""The routing strategies: which mix of LLM layers each DiT block reads, and the mixing itself.

A strategy gives logits z(t, d); alpha(t, d) = softmax(z(t, d)) over the layers that are stored, and
block d reads sum_l alpha_l(t, d) LN(H^(l)) (arXiv 2602.03510, section 3). All logits start at zero,
so every learned strategy starts as ``uniform``. ``mixes`` alone has fixed weights, and reads what
was mixed with them before it was stored.

Shapes: B batch, R rows (tokens of all captions, packed), P pairs of a batch item and a row,
L layers, H text width, D blocks, G gates, F gate width, K mixes of layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..schemas import InputError, Mixes, RoutingConfig

PHI_WIDTH = 128
GATE_WIDTH = 512
# Elements normalised at once: on a CPU what stays in its caches, on a GPU 256 MiB of fp32.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def layer_norm(h: Tensor) -> Tensor:
    """Parameter-free LN over the last axis: ``(h - mean) / sqrt(var + 1e-5)``, always in fp32."""
    with torch.autocast(h.device.type, enabled=False):
        return F.layer_norm(h.float(), h.shape[-1:], eps=1e-5)


def fuse(
    hidden: Tensor,
    alpha: Tensor | None,
    *,
    rows: Tensor | None = None,
    owners: Tensor | None = None,
) -> Tensor:
    """Mix the normalised layers of packed rows, for all blocks in one product over the layer axis.

    It is computed as ``mean_l LN_l + (alpha - 1/L) LN``: where alpha is uniform the second term is
    exactly zero, so every strategy at zero logits gives the bits of ``uniform`` whichever matrix
    kernel its shape selects. Normalised layers are made chunk by chunk, in the forward and again in
    the backward pass, and never kept: they are twice the size of the features themselves.

    Args:
        hidden: [R, L, H], any float dtype, without gradient.
        alpha: None for the plain mean; [1, D or 1, L] shared by all rows; or [B, D or 1, L]
            together with ``rows`` and ``owners``.
        rows: int64 [P], which row each pair reads.
        owners: int64 [P], which batch item's alpha each pair uses.

    Returns:
        fp32 [R or P, D or 1, H].
    """
    if alpha is None:
        return _Fuse.apply(hidden, None, None, None)
    num_layers = hidden.shape[1]
    if alpha.shape[-1] != num_layers:
        raise ValueError(
            f"hidden states hold {num_layers} layers but alpha weighs {alpha.shape[-1]}: read "
            "the layers named by router.layers_read, in that order"
        )
    deviation = alpha.float() - 1.0 / num_layers  # [B or 1, D or 1, L], exactly 0 at uniform
    return _Fuse.apply(hidden, deviation, rows, owners)


class _Fuse(torch.autograd.Function):
    """The chunked mix; differentiable in the deviation only, as hidden states are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        deviation: Tensor | None,
        rows: Tensor | None,
        owners: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden, deviation, rows, owners)
        num_pairs = len(hidden) if rows is None else len(rows)
        num_blocks = 1 if deviation is None else deviation.shape[1]
        out = hidden.new_empty((num_pairs, num_blocks, hidden.shape[-1]), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, num_pairs):
                normed = layer_norm(_take(hidden, rows, part))  # [C, L, H]
                mean = normed.mean(1, keepdim=True)  # [C, 1, H]
                if deviation is None:
                    out[part] = mean
                    continue
                mix = (
                    deviation.expand(len(normed), -1, -1)
                    if owners is None
                    else deviation[owners[part]]
                )
                torch.baddbmm(mean, mix, normed, out=out[part])  # [C, D, H]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        hidden, deviation, rows, owners = ctx.saved_tensors
        if deviation is None:
            return None, None, None, None
        total = torch.zeros_like(deviation)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, len(grad)):
                normed = layer_norm(_take(hidden, rows, part))  # [C, L, H]
                each = torch.bmm(grad[part], normed.mT)  # [C, D, L]
                if owners is None:
                    total[0] += each.sum(0)
                else:
                    total.index_add_(0, owners[part], each)
        return None, total, None, None


def _chunks(hidden: Tensor, num_pairs: int) -> list[slice]:
    elements = _CHUNK_ELEMENTS.get(hidden.device.type, _CHUNK_ELEMENTS["cuda"])
    step = max(1, elements // (hidden.shape[1] * hidden.shape[2]))
    return [slice(start, min(start + step, num_pairs)) for start in range(0, num_pairs, step)]


def _take(hidden: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    return hidden[part] if rows is None else hidden.index_select(0, rows[part])


def phi(t: Tensor, scale: float) -> Tensor:
    """Cosines and sines of ``scale * t`` at frequencies exp(-ln(1e4) k / 64): [B] -> fp32 [B, 128].

    With t in [0, 1] and scale 1, as in the authors' code, phi is almost one-dimensional; 1000 is
    what diffusion transformers use.
    """
    half = PHI_WIDTH // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = scale * t.float()[:, None] * torch.exp(-math.log(1e4) * k / half)  # [B, 64]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Gates(nn.Module):
    """G gates g(phi(t)) = Linear(SiLU(Linear(phi))), their parameters stacked: one product for all.

    The last layer starts at zero, so that every weight starts at 1/L.
    """

    def __init__(self, num_gates: int, num_layers: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_gates, GATE_WIDTH, PHI_WIDTH))
        self.bias_in = nn.Parameter(torch.zeros(num_gates, GATE_WIDTH))
        self.weight_out = nn.Parameter(torch.zeros(num_gates, num_layers, GATE_WIDTH))
        self.bias_out = nn.Parameter(torch.zeros(num_gates, num_layers))
        for weight in self.weight_in:
            nn.init.xavier_uniform_(weight)

    def forward(self, features: Tensor) -> Tensor:
        """[B, 128] -> [B, G, L], in fp32."""
        with torch.autocast(features.device.type, enabled=False):
            x = torch.einsum("bp,gfp->bgf", features, self.weight_in) + self.bias_in  # [B, G, F]
            x = F.silu(x)  # [B, G, F]
            return torch.einsum("bgf,glf->bgl", x, self.weight_out) + self.bias_out  # [B, G, L]


class Router(nn.Module, ABC):
    """Base of the strategies. A router knows which layers it weighs and which it needs to read.

    Attributes:
        layers: the LLM layers that alpha weighs, in order (all that are stored).
        layers_read: those of them whose hidden states are needed; of a store of mixes their
            numbers.
        depends_on_t: whether alpha changes with t.
        is_uniform: whether the mix over ``layers_read`` is the plain mean, whatever is learned.
    """

    depends_on_t = False
    is_uniform = False

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.layers_read = self.layers

    @abstractmethod
    def logits(self, t: Tensor | None = None) -> Tensor:
        """z(t, d) as fp32 [B or 1, D or 1, L]; 1 where it does not depend on t, or on the block."""

    def alpha(self, t: Tensor | None = None) -> Tensor:
        """softmax(z) over the layers: fp32 [B or 1, D or 1, L], as :meth:`logits`."""
        return self.logits(t).float().softmax(dim=-1)

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        """The layers that are read, and alpha over them: fp32 [D or 1, L].

        Raises:
            InputError: alpha depends on t.
        """
        positions = [self.layers.index(layer) for layer in self.layers_read]
        return [*self.layers_read], self.alpha()[0][:, positions].detach()

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All parameters, each group with its share of the router's learning rate.

        Adam moves every parameter by about its rate a step. A logit that is a parameter moves by
        that much; one that is a product moves by fan-in times as much, which the share takes back
        (as muP does for Adam, arXiv 2203.03466).
        """
        return [(list(self.parameters()), 1.0)]

    def forward(
        self,
        hidden: Tensor,
        t: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        """What the blocks read, before the projection.

        Args:
            hidden: [R, len(layers_read), H], packed rows in the order of ``layers_read``.
            t: [B], only where ``depends_on_t``, with ``rows`` and ``owners`` as in :func:`fuse`.

        Returns:
            fp32 [R or P, D or 1, H].
        """
        self._check(hidden)
        if self.is_uniform:
            return fuse(hidden, None)
        if self.depends_on_t:
            return fuse(hidden, self.alpha(t), rows=rows, owners=owners)
        return fuse(hidden, self.alpha())

    def _check(self, hidden: Tensor) -> None:
        if hidden.shape[1] != len(self.layers_read):
            raise ValueError(
                f"hidden states hold {hidden.shape[1]} layers, but this router reads "
                f"{len(self.layers_read)}: read layers {list(self.layers_read)}"
            )


class Penultimate(Router):
    """B1: layer L-1 alone, as most text-to-image models do; nothing else is read."""

    is_uniform = True

    def __init__(self, layers: Sequence[int], num_llm_layers: int) -> None:
        super().__init__(layers)
        layer = num_llm_layers - 1
        if layer not in self.layers:
            raise InputError(
                f"strategy penultimate reads layer {layer} of {num_llm_layers}, but the store "
                f"holds layers {list(self.layers)}: extract layer {layer} too, or choose another "
                "strategy"
            )
        self.layers_read = (layer,)
        one_hot = torch.full((1, 1, len(self.layers)), -torch.inf)
        one_hot[..., self.layers.index(layer)] = 0.0
        self.register_buffer("one_hot", one_hot, persistent=False)

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.get_buffer("one_hot")


class Uniform(Router):
    """B2: the mean of all layers."""

    is_uniform = True

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        self.register_buffer("zeros", torch.zeros(1, 1, len(self.layers)), persistent=False)

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.get_buffer("zeros")


class Static(Router):
    """B3: one learned vector for all blocks and all t."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        self.weight = nn.Parameter(torch.zeros(len(self.layers)))

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.weight[None, None]


class Depth(Router):
    """S2: one learned vector a block."""

    def __init__(self, layers: Sequence[int], num_blocks: int) -> None:
        super().__init__(layers)
        self.weight = nn.Parameter(torch.zeros(num_blocks, len(self.layers)))

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.weight[None]


class _Gated(Router):
    """Logits from gates on phi(t)."""

    depends_on_t = True

    def __init__(self, layers: Sequence[int], num_gates: int, phi_scale: float) -> None:
        super().__init__(layers)
        self.phi_scale = phi_scale
        self.gates = Gates(num_gates, len(self.layers))

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise InputError(
            f"strategy {type(self).__name__.lower()} weighs layers anew at every noise level, so "
            "no few mixes of them are all that its blocks read: keep the layers (strategies "
            "penultimate, uniform, static and depth can be mixed)"
        )

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        gates = self.gates
        return [
            ([gates.weight_in], 1 / PHI_WIDTH),
            ([gates.weight_out], 1 / GATE_WIDTH),
            ([gates.bias_in, gates.bias_out], 1.0),
        ]

    def logits(self, t: Tensor | None = None) -> Tensor:
        if t is None:
            raise ValueError(f"strategy {type(self).__name__.lower()} needs t [B], found None")
        return self.gates(phi(t, self.phi_scale))


class Time(_Gated):
    """S1: one gate of phi(t), shared by all blocks."""

    def __init__(self, layers: Sequence[int], phi_scale: float) -> None:
        super().__init__(layers, 1, phi_scale)


class Joint(_Gated):
    """S3: a gate of phi(t) a block."""

    def __init__(self, layers: Sequence[int], num_blocks: int, phi_scale: float) -> None:
        super().__init__(layers, num_blocks, phi_scale)


class Mixed(Router):
    """The fixed weights of another run, read from a store of its mixes; nothing is learned.

    Block d reads ``sum_k C_dk M_k``: the mixes are of normalised layers, so no LN follows.
    """

    def __init__(self, mixes: Mixes) -> None:
        super().__init__(mixes.layers)
        self.layers_read = tuple(range(1, mixes.num_mixes + 1))
        for name, rows in (("weights", mixes.weights), ("coefficients", mixes.coefficients)):
            self.register_buffer(name, torch.tensor(rows), persistent=False)

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.get_buffer("weights").log()[None]

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        return [*self.layers], self.get_buffer("weights")

    def forward(
        self,
        hidden: Tensor,
        t: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        self._check(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.get_buffer("coefficients") @ hidden.float()  # [D or 1, K], [R, K, H]


def make_router(
    config: RoutingConfig,
    *,
    layers: Sequence[int],
    num_llm_layers: int,
    num_blocks: int,
    mixes: Mixes | None = None,
) -> Router:
    """The router of a configuration.

    Args:
        layers: LLM layers in the feature store, as its manifest lists them.
        num_llm_layers: L of the LLM itself, stored or not; ``penultimate`` is layer L - 1 of it.
        num_blocks: D of the DiT.
        mixes: what the store holds in place of layers, where it does.

    Raises:
        InputError: ``penultimate`` on a store that does not hold that layer; a store of mixes under
            any strategy but ``mixes``, or for another number of blocks; ``mixes`` on other stores.
    """
    if mixes is not None:
        _check_mixes(config, mixes, num_blocks)
        return Mixed(mixes)
    match config.strategy:
        case "penultimate":
            return Penultimate(layers, num_llm_layers)
        case "uniform":
            return Uniform(layers)
        case "static":
            return Static(layers)
        case "time":
            return Time(layers, config.phi_scale)
        case "depth":
            return Depth(layers, num_blocks)
        case "joint":
            return Joint(layers, num_blocks, config.phi_scale)
        case "mixes":
            raise InputError(
                f"strategy mixes reads what semroute rewrite --routing RUN stored, but the store "
                f"holds layers {list(layers)}: make one of it, or choose another strategy"
            )


def _check_mixes(config: RoutingConfig, mixes: Mixes, num_blocks: int) -> None:
    if config.strategy != "mixes":
        raise InputError(
            f"strategy {config.strategy} weighs layers, but the store holds {mixes.num_mixes} "
            f"mixes of them, made for a run with strategy {mixes.strategy}: train from the store "
            "that it was made from, or with routing.strategy=mixes, which keeps that run's weights"
        )
    if len(mixes.weights) not in (1, num_blocks):
        raise InputError(
            f"the store holds mixes for {len(mixes.weights)} blocks, but the model has "
            f"{num_blocks}: set model.depth={len(mixes.weights)}, or rewrite the features with "
            "--routing of a run of that depth"
        )


def entropy(alpha: Tensor) -> Tensor:
    """Entropy over the last axis in nats, divided by log L: 1 is uniform, 0 is a single layer.

    Of a single layer (L = 1) it is 0.
    """
    nats = -torch.xlogy(alpha, alpha).sum(dim=-1)
    return nats / max(math.log(alpha.shape[-1]), 1e-9)
