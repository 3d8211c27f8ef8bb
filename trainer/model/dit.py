"""A diffusion transformer that reads text by cross-attention, one mix of LLM layers per block; or,
with strategy ``deep-fusion``, by joint attention with the LLM's own keys and values.

The architecture is the one of arXiv 2602.03510 as its code has it: RMSNorm, grouped-query attention
with RMS-normed queries and keys, 2D rotary positions, SwiGLU, and by default no timestep embedding.

Shapes: B batch, C channels, N image tokens, W width, R rows (tokens of all captions, packed),
P pairs of a batch item and a row, U unique captions, T text tokens of the longest caption, H text
width, D blocks, L layers, A attention heads, G key/value heads, E head width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...schemas import (
    NULL,
    SAME_WEIGHTS,
    InputError,
    LlmAttention,
    Mixes,
    ModelConfig,
    RoutingConfig,
)
from .blocks import (
    Block,
    CrossAttention,
    JointBlock,
    NoiseEmbedder,
    RMSNorm,
    RotaryPositions,
    check_heads,
    modulate,
    resolve_size,
)
from .deep_fusion import DeepFusion
from .strategies import Mixed, make_router
from .transfer import send


@dataclass(frozen=True)
class TextConditioning:
    """Keys and values of text for every block, padded to the longest caption in the batch.

    Attributes:
        keys, values: of each block, [B, G, T, E].
        mask: bool [B, 1, 1, T], False at padding; None: there is no padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None


# ----------------------------------------------------------------------------------------- model


class DiT(nn.Module):
    """The network: x_t, t and packed hidden states -> the prediction that ``Flow`` interprets.

    Args:
        config: size, patch and conditioning.
        routing: the strategy.
        latent_shape: (C, height, width) of latents; where they have several shapes, the one that is
            sampled by default. Positions are relative, so no weight depends on height and width.
        layers: LLM layers in the feature store.
        num_llm_layers: number of blocks of the LLM.
        text_width: H.
        mixes: mixes of layers that the feature store holds in place of layers.
        attention: of the LLM, for ``deep-fusion``. Heads of the blocks are then the LLM's, whatever
            the size says.

    Attributes:
        gradient_checkpointing: keep only the inputs of each block for the backward pass.

    Raises:
        InputError: latents that patches do not tile, an impossible size, or a strategy that cannot
            read what is stored.
    """

    # Classes that FSDP2 shards one by one, as Accelerate asks for them. Not Block: keys and values
    # of the text are computed before the blocks run.
    _no_split_modules = ("SelfAttention", "SwiGLU")

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        *,
        latent_shape: tuple[int, int, int],
        layers: Sequence[int],
        num_llm_layers: int,
        text_width: int,
        mixes: Mixes | None = None,
        attention: LlmAttention | None = None,
    ) -> None:
        super().__init__()
        size = resolve_size(config)
        if attention is not None:
            names = ("num_heads", "num_kv_heads", "head_dim")
            size = replace(size, **{name: getattr(attention, name) for name in names})
            check_heads(size)
            self._no_split_modules = ("JointAttention", "SwiGLU")
        channels, height, width = latent_shape
        patch = config.patch_size
        self.latent_shape = (channels, height, width)
        self.patch_size = patch
        self.check_shape(latent_shape)
        self.size = size
        self.name = config.size
        self.text_width = text_width
        self.gradient_checkpointing = False
        conditioned = config.conditioning == "adaln"

        # A fork of the generator: the rest of the network starts with the same weights under any
        # strategy.
        with torch.random.fork_rng(devices=[]):
            self.router = make_router(
                routing,
                layers=layers,
                num_llm_layers=num_llm_layers,
                num_blocks=size.depth,
                text_width=text_width,
                mixes=mixes,
                attention=attention,
            )
        if attention is None:
            width_read = self.router.width_read(text_width)
            self.context_norm = RMSNorm(width_read)
            self.context = nn.Linear(width_read, text_width)
        self.noise_embedder = NoiseEmbedder(size.width) if conditioned else None
        self.patch_in = nn.Linear(channels * patch * patch, size.width)
        self.rotary = RotaryPositions(size.head_dim)
        self.blocks = nn.ModuleList(
            Block(size, text_width, conditioned)
            if attention is None
            else JointBlock(size, conditioned)
            for _ in range(size.depth)
        )
        self.norm_out = RMSNorm(size.width)
        self.modulation_out = nn.Linear(size.width, 2 * size.width) if conditioned else None
        self.patch_out = nn.Linear(size.width, channels * patch * patch)
        self.initialize_weights()

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse latents of a shape (C, height, width) that this network cannot take.

        Raises:
            InputError: patches do not tile them, or they have other channels.
        """
        channels, height, width = shape
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"latents of {height} x {width} are not divisible by model.patch_size "
                f"{self.patch_size}: choose a patch size that divides both"
            )
        if channels != self.latent_shape[0]:
            raise InputError(
                f"latents have {channels} channels, but this model was made for "
                f"{self.latent_shape[0]}"
            )

    def initialize_weights(self) -> None:
        """Fresh weights from torch's default generator. The router keeps its own, whose zeros make
        every strategy start as uniform."""
        router = {*self.router.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in router:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # As in the reference: projected text starts small, about N(0, 1) for H = 2560.
        if not isinstance(self.router, DeepFusion):
            nn.init.normal_(self.context.weight, std=0.02)

        # adaLN-zero: self-attention and SwiGLU of every block start switched off.
        for block in cast(Iterable[Block | JointBlock], self.blocks):
            if block.modulation is not None:
                nn.init.zeros_(block.modulation.weight)
        if self.modulation_out is not None:
            nn.init.zeros_(self.modulation_out.weight)

        # The first prediction is zero for any input.
        nn.init.zeros_(self.patch_out.weight)

    # ------------------------------------------------------------------------------ parameters

    needs_conditioning = False
    """Hidden states are all that it reads of a text."""

    @property
    def depth(self) -> int:
        """Number of blocks that compute."""
        return self.size.depth

    @property
    def num_blocks(self) -> int:
        """Number of blocks that read a mix of their own: D."""
        return self.size.depth

    def num_tokens(self, shape: Sequence[int]) -> int:
        """Patches of a latent (..., h, w)."""
        return (shape[-2] // self.patch_size) * (shape[-1] // self.patch_size)

    def describe(self) -> str:
        """Its size, in a few words."""
        return f"{self.name}: {self.size.depth} blocks of width {self.size.width}"

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters that learn at the router's rate; see :meth:`.Router.parameter_groups`."""
        return self.router.parameter_groups()

    def compile_blocks(self) -> None:
        """Compile each block with ``torch.compile``."""
        for block in self.blocks:
            block.compile()

    def router_parameters(self) -> list[nn.Parameter]:
        """Parameters of the routing strategy that learn; none where its weights are fixed."""
        return [] if isinstance(self.router, DeepFusion) else list(self.router.parameters())

    def block_matrices(self) -> list[nn.Parameter]:
        """2D weights of the blocks, for which Muon is made."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]

    # ------------------------------------------------------------------------------------ text

    def encode_text(
        self,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> TextConditioning:
        """Mix, project, and lay out the text of a batch.

        Where routing does not depend on t, everything is computed once per unique caption, and the
        result serves all steps of sampling; otherwise once per batch item, for its own t.

        Args:
            hidden: [R, len(router.layers_read), H], any float dtype: rows of U unique captions.
            offsets: int64 [U + 1]; caption u is rows offsets[u] to offsets[u + 1], at least one.
                Best left on the CPU, with ``caption``: a GPU then waits for nothing.
            caption: int64 [B], which unique caption each batch item has.
            t: [B]; needed where ``router.depends_on_t``, ignored elsewhere.
            conditioning: its ``null`` is read where ``router.needs_positions``: bool [U], whether
                each caption is the null caption; by default none is.
        """
        # Captions of 2 and 3 rows, and three batch items of captions 1, 0, 1:
        #
        #     offsets  0 2 5     caption  1 0 1     starts  2 0 2     lengths  3 2 3
        #
        #     mask     1 1 1     rows (t-dependent)  2 3 4  0 1  2 3 4    one pair per item and row
        #              1 1 0     owners              0 0 0  1 1  2 2 2    the item of each pair
        #              1 1 1     starts of pairs     0       3   5
        starts, lengths = offsets[:-1][caption], offsets.diff()[caption]  # [B] each
        steps = torch.arange(int(lengths.max()), device=offsets.device)  # [T]
        mask = steps < lengths[:, None]  # [B, T]
        if self.router.depends_on_t:
            rows = send((starts[:, None] + steps)[mask], hidden.device)  # [P]
            owners = send(mask.nonzero()[:, 0], hidden.device)  # [P]
            fused = self.router(hidden, t, rows=rows, owners=owners)  # [P, D or 1, H]
            starts = lengths.cumsum(0) - lengths  # [B], now first pairs
        elif isinstance(self.router, DeepFusion):
            null = None if conditioning is None else conditioning.get(NULL)
            positions = self.router.positions(offsets, null)  # [R]
            fused = self.router.keys_and_values(hidden, send(positions, hidden.device))
        else:
            fused = self.router(hidden)  # [R, D or 1, H]
        # Padding repeats the caption's first row and is masked: it is finite and has no weight.
        index = torch.where(mask, starts[:, None] + steps, starts[:, None])  # [B, T]
        index = send(index, hidden.device)

        readers = [block.reader for block in cast(Iterable[Block | JointBlock], self.blocks)]
        both = fused
        if not isinstance(self.router, DeepFusion):
            crossing = cast(list[CrossAttention], readers)
            both = self._project(fused, [attention.read_weights() for attention in crossing])
        keys, values = [], []
        # All blocks at once: [R or P, D, 2*G*E] -> [B, T, 2*G*E] per block.
        padded = both.flatten(1).index_select(0, index.flatten()).unflatten(0, index.shape)
        each = padded.unflatten(-1, both.shape[1:]).unbind(2)
        for reader, of_block in zip(readers, each, strict=True):
            k, v = reader.read(of_block)  # [B, G, T, E] each
            keys.append(k)
            values.append(v)
        # Captions of one length need none, and then flash attention does. Where the mask is on a
        # GPU, to look at it would be to wait.
        if mask.device.type == "cpu" and bool(mask.all()):
            return TextConditioning(keys, values, None)
        return TextConditioning(keys, values, send(mask[:, None, None], hidden.device))

    def _project(self, fused: Tensor, weights: list[Tensor]) -> Tensor:
        """Linear(RMSNorm(fused)) times each block's weights, which gives its keys and values.

        That is (fused W^T) s + b for the scale s of each row. So where there are more rows of text
        than rows of weights, W is multiplied with the weights first, not with the text.

        Args:
            fused: fp32 [R or P, D or 1, H].
            weights: of each block, [2*G*E, H].

        Returns:
            [R or P, D, 2*G*E].
        """
        num_blocks = len(weights)
        weight = torch.cat(weights)  # [D*2*G*E, H]
        scale: Tensor | None = None
        if fused.shape[0] * fused.shape[1] > len(weight):
            bias = (weight @ self.context.bias).unflatten(0, (num_blocks, 1, -1))  # [D, 1, 2*G*E]
            weight = weight @ (self.context.weight * self.context_norm.weight)  # [D*2*G*E, H]
            scale = self.context_norm.scale(fused).transpose(0, 1)  # [D or 1, R or P, 1]
            context = fused.transpose(0, 1)  # [D or 1, R or P, H]
        else:  # mix by mix: rows are rounded the same however many mixes there are
            mixes = [self.context(self.context_norm(mix)) for mix in fused.unbind(1)]
            context = torch.stack(mixes)  # [D or 1, R or P, H]
        if torch.is_autocast_enabled(context.device.type):  # once, not in a copy per block
            context = context.to(torch.get_autocast_dtype(context.device.type))
        by_block = weight.unflatten(0, (num_blocks, -1)).mT  # [D, H, 2*G*E]
        product = torch.bmm(context.expand(num_blocks, -1, -1), by_block)  # [D, R or P, 2*G*E]
        if scale is not None:
            product = (product * scale + bias).to(product.dtype)
        return product.transpose(0, 1)  # [R or P, D, 2*G*E]

    @contextmanager
    def reading(self, mixes: Mixes | None) -> Iterator[None]:
        """A context in which the network reads features that hold these mixes; None: layers.

        Raises:
            InputError: mixes of other weights than this network's; or a network of strategy
                ``mixes`` and features that hold layers.
        """
        router = self.router
        if mixes is None and isinstance(router, Mixed):
            raise InputError(
                "this network reads mixes of layers, but the features hold layers: rewrite them "
                "with --routing and the network's run"
            )
        if mixes is not None:
            layers, weights = router.fixed_weights()
            distance = mixes.distance(layers, weights.tolist())
            if distance > SAME_WEIGHTS:
                raise InputError(
                    f"the features hold mixes of layers {mixes.layers} with weights other than "
                    "this network's: rewrite them with --routing and the network's run"
                )
            self.router = Mixed(mixes).to(self.patch_out.weight.device)
        try:
            yield
        finally:
            self.router = router

    # ----------------------------------------------------------------------------------- image

    def denoise(self, x_t: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """The prediction, with one noise level per item: [B, C, h, w], [B] -> fp32 [B, C, h, w]."""
        channels, height, width = x_t.shape[1:]
        self.check_shape((channels, height, width))
        rotary = self.rotary(height // self.patch_size, width // self.patch_size)
        noise = None if self.noise_embedder is None else self.noise_embedder(t)  # [B, W]
        x = self.patch_in(self._patchify(x_t)).float()  # [B, N, W], the residual stream is fp32
        for block, k, v in zip(self.blocks, text.keys, text.values, strict=True):
            inputs = (x, noise, rotary, k, v, text.mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)  # [B, N, W]
        x = self.norm_out(x)  # [B, N, W]
        if self.modulation_out is not None and noise is not None:
            shift, scale = self.modulation_out(F.silu(noise))[:, None].float().chunk(2, dim=-1)
            x = modulate(x, shift, scale)  # [B, N, W]
        return self._unpatchify(self.patch_out(x).float(), height, width)  # [B, C, h, w]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t_routing: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """:meth:`encode_text` and :meth:`denoise` in one call, so that wrappers of ``forward`` see
        every parameter used.

        Args:
            x_t: [B, C, h, w].
            t: [B].
            hidden, offsets, caption, conditioning: as for :meth:`encode_text`.
            t_routing: [B], the t that routing sees; by default t.

        Returns:
            fp32 [B, C, h, w].
        """
        t_routing = t if t_routing is None else t_routing
        text = self.encode_text(hidden, offsets, caption, t_routing, conditioning)
        return self.denoise(x_t, t, text)  # [B, C, h, w]

    def _patchify(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        p = self.patch_size
        x = x.reshape(batch, channels, height // p, p, width // p, p)  # [B, C, h/p, p, w/p, p]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C*p*p]

    def _unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        p, channels = self.patch_size, self.latent_shape[0]
        x = x.reshape(len(x), height // p, width // p, channels, p, p)  # [B, h/p, w/p, C, p, p]
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), channels, height, width)  # [B, C, h, w]
