"""A pretrained transformer of diffusers that learns which LLM layers its blocks read.

What socket s reads is ``base_s + std(base_s) sum_l (alpha_l - alpha0_l) LN(h_l)``, where the base
is the layer that the network was trained with, alpha0 is alpha at zero logits, and LN and std are
those of each token. At zero logits that is the base to the bit, for every strategy.

Shapes: B batch, R rows (tokens of all captions, packed), U unique captions, P rows or pairs of a
batch item and a row, T text rows of the padded layout, L layers, K base layers that the network
reads (taps), H text width, D sockets, C channels, h x w latent.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...schemas import LN_EPS, MASK, InputError, Mixes, ModelConfig, RoutingConfig
from ..model.router import Learned, Router
from ..model.strategies import make_router
from ..model.transfer import send
from .base import Family, Text, count_mixes
from .lora import add_lora
from .sockets import Sockets, Source, add

PARTS = {
    "fusion": {"fusion"},
    "router": {"router"},
    "gain": {"gain"},
    "lora": {"lora"},
    "router+lora": {"router", "lora"},
    "router+projection": {"router", "projection"},
    "full": {"router", "network"},
}
"""What ``model.train`` trains."""


class Unrouted(Router):
    """No mix: the network reads its base layers, each as it is."""

    def __init__(self, layers: Sequence[int], base_layers: Sequence[int]) -> None:
        super().__init__(layers, base_layers)
        share = torch.zeros(1, 1, len(self.layers))
        for layer in base_layers:
            share[..., self.layers.index(layer)] = 1 / len(base_layers)
        self.register_buffer("share", share, persistent=False)

    def alpha(self, t: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        return self.get_buffer("share")


class Routed(nn.Module):
    """A pretrained transformer and a router: x_t, t and packed hidden states -> a prediction.

    It has the interface of :class:`semroute.trainer.model.dit.DiT`. The transformer stays in
    evaluation mode, so that it is the network that was published.

    Args:
        transformer: a transformer of diffusers; only what ``config.train`` names keeps gradients.
        family: of the transformer.
        layers: LLM layers in the feature store.
        base_layers: those of them that the transformer was trained with, in its order.
        latent_shape: (C, h, w) of latents; where they have several shapes, the one that is sampled
            by default.
        trainable: False: the transformer is somebody's to use; nothing of it has gradients, and it
            keeps its dtype.

    Attributes:
        path: ``flow`` or ``ddpm``, see :class:`.base.Family`.
        deviates: something is added to the base.
        hooked: it is added where blocks read text, not to what the network is given.

    Raises:
        InputError: a base layer is not stored, the strategy does not learn, or ``train`` or
            ``where`` does not fit the family.
    """

    def __init__(
        self,
        transformer: Any,
        family: Family,
        config: ModelConfig,
        routing: RoutingConfig,
        *,
        layers: Sequence[int],
        base_layers: Sequence[int],
        num_llm_layers: int,
        text_width: int,
        latent_shape: tuple[int, int, int],
        mixes: Mixes | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if mixes is not None:
            raise InputError(
                "a pretrained network reads its own layers beside the mix, but the store holds "
                "mixes of layers: train from the store that it was made from"
            )
        missing = [layer for layer in base_layers if layer not in layers]
        if missing:
            raise InputError(
                f"{family.name} reads layers {[*base_layers]}, but the store does not hold layers "
                f"{missing}: extract them too, as --template {family.template} does"
            )
        if trainable:
            family.prepare(transformer)
        self.transformer = transformer.requires_grad_(False)
        self.family = family
        self.path = family.path
        self.where = routing.where
        self.guidance = config.guidance
        self.base_layers = tuple(base_layers)
        self.latent_shape = latent_shape
        self.text_width = text_width
        self.parts = PARTS[config.train]
        sockets = family.sockets(transformer)
        self.taps = None if sockets[0].tap is None else [s.tap for s in sockets]
        self.depth = len(sockets)
        self.num_blocks = count_mixes(sockets, routing.where, len(base_layers))
        with torch.random.fork_rng(devices=[]):
            self.router = self._make_router(routing, layers, num_llm_layers)
        self.gain = nn.Parameter(torch.zeros(self.num_blocks)) if "gain" in self.parts else None
        self.fusion_gain = self._make_fusion_gain()
        if "lora" in self.parts:
            assert config.lora is not None
            add_lora(transformer, config.lora, family)
        if trainable:
            self._open_weights(config)
        by_block = self.where == "blocks" or self.taps is not None
        self.deviates = not self.parts.isdisjoint({"gain", "router"})
        self.hooked = by_block and self.deviates
        self.sockets = Sockets(transformer, family, sockets if self.hooked else [])
        # As Accelerate asks for the classes that FSDP2 shards one by one.
        self._no_split_modules = sorted({type(block).__name__ for block in self._blocks()})
        positions = [self.router.layers_read.index(layer) for layer in base_layers]
        self.register_buffer("base_positions", torch.tensor(positions), persistent=False)

    def _make_router(
        self, routing: RoutingConfig, layers: Sequence[int], num_llm_layers: int
    ) -> Router:
        if "router" not in self.parts:
            return Unrouted(layers, self.base_layers)
        router = make_router(
            routing,
            layers=layers,
            num_llm_layers=num_llm_layers,
            num_blocks=self.num_blocks,
            text_width=self.text_width,
        )
        if not isinstance(router, Learned):
            raise InputError(
                f"strategy {routing.strategy} has no logits that start at zero, so it would not "
                "leave a pretrained network as it is at the start: choose static, time, depth, "
                "joint or token"
            )
        return router

    def _make_fusion_gain(self) -> nn.Parameter | None:
        """A gain per tap, if ``train`` names it."""
        if "fusion" not in self.parts:
            return None
        if self.family.fusion is None:
            raise InputError(
                f"model.train is fusion, but {self.family.name} has no weights of layers of its "
                "own: train the router"
            )
        if self.family.fusion == "gains":
            return nn.Parameter(torch.zeros(len(self.base_layers)))
        return None

    def _open_weights(self, config: ModelConfig) -> None:
        """Let the weights of the network learn that ``train`` names."""
        opened: list[nn.Module] = []
        if "network" in self.parts:
            if self.dtype != torch.float32:
                raise InputError(
                    f"model.train is {config.train}, which trains all weights, in float32, but "
                    f"model.dtype is {config.dtype}: leave it out"
                )
            self.transformer.requires_grad_(True)
        if "projection" in self.parts:
            opened += [self.transformer.get_submodule(name) for name in self.family.projection]
        if "fusion" in self.parts and self.family.fusion == "projector":
            opened.append(self.transformer.text_fusion.projector)
        for module in opened:
            module.requires_grad_(True)
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                self._learn_apart(part)
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _learn_apart(self, module: nn.Module) -> None:
        """Let a module have another dtype than the network around it."""

        def before(module: nn.Module, args: Any) -> Any:
            dtype = next(module.parameters()).dtype
            floating = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
            return tuple(a.to(dtype) if f else a for a, f in zip(args, floating, strict=True))

        def after(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output.to(self.dtype)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    # ------------------------------------------------------------------------- as the DiT has it

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep only the inputs of each block for the backward pass."""
        return bool(self.transformer.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on != self.gradient_checkpointing:
            name = "enable" if on else "disable"
            getattr(self.transformer, f"{name}_gradient_checkpointing")()

    @property
    def needs_conditioning(self) -> bool:
        """Whether it reads more of a text than the hidden states of its tokens."""
        return self.family.needs_conditioning

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network takes its inputs; what learns in it may have another."""
        parameters = [*self.transformer.parameters()]
        return next((p for p in parameters if not p.requires_grad), parameters[0]).dtype

    def train(self, mode: bool = True) -> "Routed":
        super().train(mode)
        self.transformer.eval()
        return self

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse latents of a shape (C, h, w) that this network cannot take.

        Raises:
            InputError: other channels, or patches do not tile them.
        """
        config = self.transformer.config
        channels, patch = self.family.latents(config)
        if shape[0] != channels:
            raise InputError(
                f"latents have {shape[0]} channels, but {self.family.name} takes {channels}: "
                "encode the images with its own VAE (semroute latents --vae PIPELINE)"
            )
        if shape[1] % patch or shape[2] % patch:
            raise InputError(
                f"latents of {shape[1]} x {shape[2]} are not divisible by {patch}, the side of a "
                f"patch of {self.family.name}: choose a size that is"
            )

    def describe(self) -> str:
        """Its class and what of it learns, in a few words."""
        sockets = "1 socket" if self.num_blocks == 1 else f"{self.num_blocks} sockets"
        return f"{type(self.transformer).__name__} ({self.family.name}), {sockets}"

    def num_tokens(self, shape: Sequence[int]) -> int:
        """Patches of a latent (..., h, w)."""
        _, side = self.family.latents(self.transformer.config)
        return (shape[-2] // side) * (shape[-1] // side)

    def router_parameters(self) -> list[nn.Parameter]:
        """Parameters that weigh layers: of the strategy, of gains, or of the network's own
        fusion."""
        own = [*self.router.parameters()]
        own += [each for each in (self.gain, self.fusion_gain) if each is not None]
        if "fusion" in self.parts and self.fusion_gain is None:
            own += [*self.transformer.text_fusion.projector.parameters()]
        return own

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """As :meth:`Router.parameter_groups`, of :meth:`router_parameters`."""
        groups = self.router.parameter_groups() if "router" in self.parts else []
        listed = {id(parameter) for group, _ in groups for parameter in group}
        others = [p for p in self.router_parameters() if id(p) not in listed]
        return [*groups, (others, 1.0)] if others else groups

    def block_matrices(self) -> list[nn.Parameter]:
        """2D weights of the network that learn, for which Muon is made."""
        apart = {id(parameter) for parameter in self.router_parameters()}
        learning = [p for p in self.transformer.parameters() if p.requires_grad]
        return [p for p in learning if p.ndim == 2 and id(p) not in apart]

    def compile_blocks(self) -> None:
        """Compile each block's ``forward``; the hooks around it stay as they are."""
        for block in self._blocks():
            block.forward = torch.compile(block.forward)

    def _blocks(self) -> Iterator[nn.Module]:
        """Blocks of the transformer; half of the classes of diffusers do not say which repeat."""
        for blocks in self.transformer.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else []:
                if type(block).__name__.endswith("Block"):
                    yield block

    @contextmanager
    def reading(self, mixes: Mixes | None) -> Iterator[None]:
        """A context in which the network reads features that hold these mixes; None: layers.

        Raises:
            InputError: any mixes.
        """
        if mixes is not None:
            raise InputError(
                "this network reads layers, but the features hold mixes of them: use the features "
                "that they were made from"
            )
        yield

    # ------------------------------------------------------------------------------------- text

    def encode_text(
        self,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> Source:
        """Lay out the text of a batch, and compute what is added for each socket.

        Args:
            hidden: [R, len(router.layers_read), H], any float dtype: rows of U unique captions.
            offsets: int64 [U + 1], on the CPU; caption u is rows offsets[u] to offsets[u + 1].
            caption: int64 [B], on the CPU: which unique caption each batch item has.
            t: [B]; needed where ``router.depends_on_t``, ignored elsewhere.
            conditioning: what the pipeline gives the network, by name: [U, ...], with ``mask`` of
                the captions' own rows; or, where the network reads no others, rows [R, ...].
        """
        # Captions of 2 and 3 rows in a layout of 4, and two batch items of captions 1, 0. What is
        # added for pads is the last row of the deviation, which is zero:
        #
        #     index of rows   2 3 4 5     of pairs (t-dependent)  0 1 2 5
        #                     0 1 5 5                             3 4 5 5
        device = hidden.device
        starts, lengths = offsets[:-1][caption], offsets.diff()[caption]  # [B] each
        own = None
        if conditioning is not None and not self.family.needs_conditioning:
            own = self._own_rows(conditioning, hidden)
        given = self._given(conditioning, caption, lengths, device)
        if given is None:
            mask = torch.arange(self._num_rows(lengths)) < lengths[:, None]  # [B, T]
        else:
            mask = given.mask
        rows = torch.where(mask, starts[:, None] - 1 + mask.cumsum(1), len(hidden))  # [B, T]
        if given is None:
            own = self._base_rows(hidden) if own is None else own
            padded = torch.cat([own, own.new_zeros(1, *own.shape[1:])])
            chosen = send(rows.flatten(), device)
            base = padded.index_select(0, chosen).unflatten(0, rows.shape)
            text = Text(base.to(self.dtype), send(mask, device), lengths.tolist())
        else:
            text = replace(given, lengths=lengths.tolist())
        if getattr(self.transformer.config, "guidance_embeds", False):
            scale = torch.full((len(caption),), self.guidance, device=device)
            text = replace(text, extras={**text.extras, "guidance": scale})
        text = replace(text, layers=self.base_layers)
        return self.read(text, hidden, rows, t, own)

    def read(
        self,
        text: Text,
        hidden: Tensor,
        rows: Tensor,
        t: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Source:
        """What the sockets read of a text that is laid out.

        Args:
            hidden: [R, len(router.layers_read), H], any float dtype.
            rows: row of ``hidden`` for each row of the text, int64 [B, T], on the CPU, where no
                device is waited for; R where nothing is added.
            t: as for :meth:`encode_text`.
            own: base layers of the rows, [R, K, H]; by default those of ``hidden``.
        """
        own = self._base_rows(hidden) if own is None else own
        if self.fusion_gain is not None:
            text = text.with_base(add(text.base, self.fusion_gain[:, None] * text.base.float()))
        mask = rows < len(hidden)
        if not mask.any():
            return Source(
                text, hidden.new_zeros(1, 1, 1, 1), send(torch.zeros_like(rows), hidden.device)
            )
        if self.router.depends_on_t:
            pairs = send(rows[mask], hidden.device)  # [P]
            owners = send(mask.nonzero()[:, 0], hidden.device)  # [P]
            rows = torch.full(mask.shape, len(pairs)).masked_scatter(mask, torch.arange(len(pairs)))
            deviation = self._deviation(hidden, own, t, pairs, owners)
        else:
            deviation = self._deviation(hidden, own)
        index = send(rows, hidden.device)
        if deviation is None:
            return Source(text, hidden.new_zeros(0), index)
        source = Source(text, torch.cat([deviation, 0 * deviation[:1].detach()]), index)
        if not self.hooked:
            source.text = text.with_base(add(text.base, source.deviation_of(0)))
        return source

    def _own_rows(self, conditioning: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Base layers of the rows of ``hidden`` as the pipeline gave them: [R, K, H]."""
        values = conditioning["prompt_embeds"]
        if "prompt_layers" in conditioning:  # FIBO: all layers of the LLM, from 0
            values = conditioning["prompt_layers"][..., [*self.base_layers], :]
        if conditioning[MASK].ndim == 2:  # padded
            own = conditioning[MASK].bool().flatten().nonzero()[:, 0]
            values = values.flatten(0, 1).index_select(0, send(own, values.device))
        if len(values) != len(hidden):
            raise InputError(
                f"captions have {len(hidden)} rows in the features, but {len(values)} in the "
                "conditioning: extract the features from the same captions with --template "
                f"{self.family.template}"
            )
        sizes = (len(self.base_layers), hidden.shape[-1])
        values = values.flatten(1)
        interleaved = self.family.interleaved
        return values.unflatten(1, sizes[::-1]).mT if interleaved else values.unflatten(1, sizes)

    def _base_rows(self, hidden: Tensor) -> Tensor:
        """[R, K, H]."""
        return hidden[:, self.get_buffer("base_positions").to(hidden.device)]

    def _given(
        self,
        conditioning: Mapping[str, Tensor] | None,
        caption: Tensor,
        lengths: Tensor,
        device: torch.device,
    ) -> Text | None:
        """The text as the pipeline gave it, without lengths; None: from rows of the captions."""
        if not self.family.needs_conditioning:
            return None
        if conditioning is None:
            raise InputError(
                f"{self.family.name} reads padding rows or a second encoder, which features do not "
                "hold: name a store that semroute conditioning made as data.conditioning"
            )
        cpu = torch.device("cpu")
        each = {
            name: send(value[send(caption, value.device)], cpu if name == MASK else device)
            for name, value in conditioning.items()
        }
        text = self.family.read_conditioning(each, self.transformer.config, self.dtype)
        own = zip(lengths.tolist(), text.mask.sum(1).tolist(), strict=True)
        different = next(((here, there) for here, there in own if here != there), None)
        if different is not None:
            raise InputError(
                f"a caption has {different[0]} rows in the features, but {different[1]} in the "
                "conditioning: extract the features from the same captions with --template "
                f"{self.family.template}"
            )
        return text

    def _num_rows(self, lengths: Tensor) -> int:
        """T, of which no caption may have more."""
        longest = int(lengths.max())
        num = longest if self.family.length is None else self.family.length
        if longest > num:
            raise InputError(
                f"a caption has {longest} rows, but {self.family.name} takes {num}: extract the "
                f"features with --template {self.family.template}, which cuts captions to that"
            )
        return num

    def _deviation(
        self,
        hidden: Tensor,
        own: Tensor,
        t: Tensor | None = None,
        rows: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> Tensor | None:
        """What is added to the base, of every row or pair: fp32 [P, D or 1, K, H]."""
        read = own if rows is None else own[rows]  # [P, K, H]
        if self.gain is not None:
            return self._by_socket(self.gain[None, :, None], read.float())
        if not isinstance(self.router, Learned):
            return None
        mix = self.router.deviation(hidden, t, rows=rows, owners=owners)  # [P, S or 1, H]
        variance = read.float().var(-1, unbiased=False, keepdim=True)
        return self._by_socket(mix, (variance + LN_EPS).sqrt())

    def _by_socket(self, mixes: Tensor, scale: Tensor) -> Tensor:
        """Products by socket and tap: [P or 1, S or 1, H or 1] and [P, K, H or 1] ->
        [P, D or 1, K or 1, H]."""
        if self.taps is not None:  # a tap per socket
            return (mixes * scale[:, self.taps])[:, :, None]
        if mixes.shape[1] == 1:
            return mixes[:, :, None] * scale[:, None]
        return mixes.unflatten(1, (-1, len(self.base_layers))) * scale[:, None]

    # ----------------------------------------------------------------------------------- image

    def denoise(self, x_t: Tensor, t: Tensor, text: Source) -> Tensor:
        """The prediction: [B, C, h, w], [B] -> fp32 [B, C, h, w]."""
        if not self.hooked:
            return self._call(x_t, t, text.text)
        with self.sockets.reading(text):
            return self.sockets.mark(self._call(x_t, t, text.text), text)

    def _call(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        prediction: Tensor = self.family.call(self.transformer, x_t.to(self.dtype), t, text)
        return prediction.float()

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
        """:meth:`encode_text` and :meth:`denoise` in one call.

        Args:
            x_t: [B, C, h, w], in the units of the pipeline's latents.
            t: [B].
            hidden, offsets, caption, conditioning: as for :meth:`encode_text`.
            t_routing: [B], the t that routing sees; by default t.

        Returns:
            fp32 [B, C, h, w].
        """
        seen = t if t_routing is None else t_routing
        return self.denoise(x_t, t, self.encode_text(hidden, offsets, caption, seen, conditioning))
