"""The routing strategies: which mix of LLM layers each DiT block reads.

A strategy gives logits z(t, d) and weights alpha(t, d) over the stored layers, and block d reads
sum_l alpha_l(t, d) LN(H^(l)) (arXiv 2602.03510, section 3). All logits start at zero, so every
learned strategy starts as ``uniform``. ``mixes`` reads layers that were mixed, with the fixed
weights of another run, before they were stored. Baselines of deployed models: :mod:`.deployed`.

Shapes: B batch, R rows (tokens of all captions, packed), L layers, H text width, D blocks, G gates,
K mixes of layers, C rows of a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...schemas import InputError, LlmAttention, Mixes, RoutingConfig
from .deep_fusion import DeepFusion
from .deployed import Concat, LayerAttention, OnePerBlock
from .fusion import fuse, in_chunks, layer_norm
from .gates import GATE_WIDTH, PHI_WIDTH, Gates, phi
from .router import Learned, Router, no_fixed_mix


class Penultimate(Router):
    """B1: layer L-1 alone, as in most text-to-image models; nothing else is read."""

    def __init__(self, layers: Sequence[int], num_llm_layers: int) -> None:
        layer = num_llm_layers - 1
        if layer not in layers:
            raise InputError(
                f"strategy penultimate reads layer {layer} of {num_llm_layers}, but the store "
                f"holds layers {list(layers)}: extract layer {layer} too, or choose another "
                "strategy"
            )
        super().__init__(layers, [layer])
        one_hot = torch.zeros(1, 1, len(self.layers))
        one_hot[..., self.layers.index(layer)] = 1.0
        self.register_buffer("one_hot", one_hot, persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("one_hot")

    def mix(self, hidden: Tensor) -> Tensor:
        return fuse(hidden, None)


class Uniform(Router):
    """B2: the mean of all layers."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(layers)
        mean = torch.full((1, 1, len(self.layers)), 1 / len(self.layers))
        self.register_buffer("mean", mean, persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("mean")

    def mix(self, hidden: Tensor) -> Tensor:
        return fuse(hidden, None)


class Static(Learned):
    """B3: one learned vector for all blocks and all t; L parameters."""

    def __init__(self, layers: Sequence[int], config: RoutingConfig) -> None:
        super().__init__(layers, config)
        self.weight = nn.Parameter(torch.zeros(len(self.layers)))

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.weight[None, None]


class Depth(Learned):
    """S2: one learned vector per block; D L parameters."""

    def __init__(self, layers: Sequence[int], num_blocks: int, config: RoutingConfig) -> None:
        super().__init__(layers, config)
        self.weight = nn.Parameter(torch.zeros(num_blocks, len(self.layers)))

    def logits(self, t: Tensor | None = None) -> Tensor:
        return self.weight[None]


class LowRankDepth(Learned):
    """S2 with logits z = U V of rank r: r (D + L) parameters.

    Blocks choose among r patterns of layers: U [D, r] starts at zero, V [r, L] normal.

    Raises:
        InputError: r above D or L, where it would not restrict anything.
    """

    def __init__(
        self, layers: Sequence[int], num_blocks: int, config: RoutingConfig, rank: int
    ) -> None:
        super().__init__(layers, config)
        highest = min(num_blocks, len(self.layers))
        if rank > highest:
            raise InputError(
                f"routing.rank is {rank}, but logits of {num_blocks} blocks over "
                f"{len(self.layers)} layers have at most rank {highest}: choose a smaller rank, or "
                "leave it out"
            )
        self.rank = rank
        self.blocks = nn.Parameter(torch.zeros(num_blocks, rank))
        self.patterns = nn.Parameter(torch.randn(rank, len(self.layers)))

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [([self.blocks, self.patterns], 1 / self.rank)]

    def logits(self, t: Tensor | None = None) -> Tensor:
        with torch.autocast(self.blocks.device.type, enabled=False):
            return (self.blocks @ self.patterns)[None]  # [1, D, L]


class _Gated(Learned):
    """Logits from gates on phi(t)."""

    depends_on_t = True

    def __init__(self, layers: Sequence[int], num_gates: int, config: RoutingConfig) -> None:
        super().__init__(layers, config)
        self.gates = Gates(num_gates, len(self.layers))

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise no_fixed_mix(self.config.strategy, "weighs layers differently at every noise level")

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        gates = self.gates
        return [
            ([gates.weight_in], 1 / PHI_WIDTH),
            ([gates.weight_out], 1 / GATE_WIDTH),
            ([gates.bias_in, gates.bias_out], 1.0),
        ]

    def logits(self, t: Tensor | None = None) -> Tensor:
        if t is None:
            raise ValueError(f"strategy {self.config.strategy} needs t [B], found None")
        return self.gates(phi(t, self.config.phi_scale))


class Time(_Gated):
    """S1: one gate of phi(t), shared by all blocks; 128 x 512 + 512 + 512 L + L parameters."""

    def __init__(self, layers: Sequence[int], config: RoutingConfig) -> None:
        super().__init__(layers, 1, config)


class Joint(_Gated):
    """S3: one gate of phi(t) per block; D times the parameters of S1."""

    def __init__(self, layers: Sequence[int], num_blocks: int, config: RoutingConfig) -> None:
        super().__init__(layers, num_blocks, config)


class Token(Learned):
    """Each token weighs its own layers: z_dl = q_d . LN(h^(l)) + b_dl, with one query per block.

    Attention pooling over layers whose keys are the normalised layers themselves: D (H + L)
    parameters, all zero at the start. Nothing depends on t, so text is encoded once per prompt.
    """

    depends_on_content = True

    def __init__(
        self, layers: Sequence[int], num_blocks: int, config: RoutingConfig, text_width: int
    ) -> None:
        super().__init__(layers, config)
        self.query = nn.Parameter(torch.zeros(num_blocks, text_width))
        self.bias = nn.Parameter(torch.zeros(num_blocks, len(self.layers)))

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        raise no_fixed_mix("token", "weighs layers differently for every token")

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [([self.query], 1 / self.query.shape[1]), ([self.bias], 1.0)]

    def logits(self, t: Tensor | None = None) -> Tensor:
        """Logits of a token to which no query responds."""
        return self.bias[None]

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            raise ValueError(
                "strategy token weighs the layers of each token: pass hidden "
                f"[R, {len(self.layers_read)}, H], found None"
            )
        weights = in_chunks(lambda part: self._weigh(layer_norm(part)), hidden)  # [R, D, L]
        return weights.mean(0, keepdim=True)

    def mix(self, hidden: Tensor) -> Tensor:
        return in_chunks(self._mix, hidden)

    def deviation(
        self,
        hidden: Tensor,
        t: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor:
        self._check_layers(hidden)
        return in_chunks(self._deviation, hidden)

    def _mix(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            normed = layer_norm(hidden)  # [C, L, H]
            deviation = self._weigh(normed) - 1.0 / len(self.layers)  # [C, D, L]
            return torch.baddbmm(normed.mean(1, keepdim=True), deviation, normed)  # [C, D, H]

    def _deviation(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            normed = layer_norm(hidden)  # [C, L, H]
            return (self._weigh(normed) - 1.0 / len(self.layers)) @ normed  # [C, D, H]

    def _weigh(self, normed: Tensor) -> Tensor:
        with torch.autocast(normed.device.type, enabled=False):
            scores = (normed @ self.query.mT).mT  # [C, D, L]
            return self.weigh(scores + self.bias)


class Mixed(Router):
    """The fixed weights of another run, read from a store of its mixes; nothing is learned.

    Block d reads ``sum_k C_dk M_k``: the mixes are of normalised layers, so no LN follows.
    """

    def __init__(self, mixes: Mixes) -> None:
        super().__init__(mixes.layers, range(1, mixes.num_mixes + 1))
        for name, rows in (("weights", mixes.weights), ("coefficients", mixes.coefficients)):
            self.register_buffer(name, torch.tensor(rows), persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("weights")[None]

    def fixed_weights(self) -> tuple[list[int], Tensor]:
        return [*self.layers], self.get_buffer("weights")

    def mix(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.get_buffer("coefficients") @ hidden.float()  # [D or 1, K], [R, K, H]


class Given(Router):
    """Given weights [D or 1, L], to test a network trained with others; nothing is learned.

    Raises:
        InputError: weights for another number of layers.
    """

    def __init__(self, layers: Sequence[int], weights: Tensor) -> None:
        super().__init__(layers)
        if weights.ndim != 2 or weights.shape[1] != len(self.layers):
            raise InputError(
                f"found weights {list(weights.shape)}, expected [blocks, {len(self.layers)}]"
            )
        self.register_buffer("weights", weights.detach().float(), persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("weights")[None]


def make_router(
    config: RoutingConfig,
    *,
    layers: Sequence[int],
    num_llm_layers: int,
    num_blocks: int,
    text_width: int,
    mixes: Mixes | None = None,
    attention: LlmAttention | None = None,
) -> Router:
    """The router of a configuration, with fresh weights from torch's default generator.

    Args:
        layers: LLM layers in the feature store, as its manifest lists them.
        num_llm_layers: L of the LLM itself, stored or not; ``penultimate`` reads its layer L - 1.
        num_blocks: D of the DiT.
        text_width: H.
        mixes: mixes of layers that the store holds in place of layers.
        attention: shapes of the LLM's keys and values, for ``deep-fusion``.

    Raises:
        InputError: the store does not hold the layers that the strategy reads; a store of mixes
            with a strategy other than ``mixes``, or for another number of blocks; ``mixes`` on a
            store of layers; ``rank`` or ``top_k`` too large.
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
            return Static(layers, config)
        case "time":
            return Time(layers, config)
        case "depth" if config.rank is not None:
            return LowRankDepth(layers, num_blocks, config, config.rank)
        case "depth":
            return Depth(layers, num_blocks, config)
        case "joint":
            return Joint(layers, num_blocks, config)
        case "token":
            return Token(layers, num_blocks, config, text_width)
        case "one-per-block":
            return OnePerBlock(layers, num_blocks, config.layers)
        case "concat":
            return Concat(layers, num_llm_layers, config.layers)
        case "attention":
            return LayerAttention(layers, num_llm_layers, config.layers, text_width)
        case "deep-fusion":
            if attention is None:
                raise ValueError("strategy deep-fusion needs the LLM's attention, found None")
            return DeepFusion(
                layers, attention, num_llm_layers, num_blocks, config.layers, text_width
            )
        case "mixes":
            raise InputError(
                f"strategy mixes reads what semroute rewrite --routing RUN stored, but the store "
                f"holds layers {list(layers)}: rewrite it that way, or choose another strategy"
            )


def _check_mixes(config: RoutingConfig, mixes: Mixes, num_blocks: int) -> None:
    if config.strategy != "mixes":
        raise InputError(
            f"strategy {config.strategy} reads layers, but the store holds {mixes.num_mixes} "
            f"mixes of them, made for a run with strategy {mixes.strategy}: train from the store "
            "that it was made from, or with routing.strategy=mixes, which keeps that run's weights"
        )
    if len(mixes.weights) not in (1, num_blocks):
        raise InputError(
            f"the store holds mixes for {len(mixes.weights)} blocks, but the model has "
            f"{num_blocks}: set model.depth={len(mixes.weights)}, or rewrite the features with "
            "--routing and a run of that depth"
        )
