"""What an adapter knows about a family of pretrained transformers: data and small functions.

Shapes: B batch, T text rows of the padded layout, K base layers that the network reads (taps), H
text width, W width of the network, C channels, h x w latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """Text of a batch, laid out as the network takes it.

    Attributes:
        base: the layers that the network reads, at the rows that routing may change, in the
            network's dtype: [B, T, K, H].
        mask: the caption's own rows, bool [B, T].
        lengths: number of these rows of each caption, on the CPU, where no device is waited for.
        layers: the LLM layer of each of the K.
        extras: what the pipeline gives the network besides, by name: pooled vectors, rows of a
            second encoder; ``guidance`` [B], for networks that are told the scale.
    """

    base: Tensor
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: Sequence[int] = ()
    layers: Sequence[int] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all rows are the captions' own."""
        return min(self.lengths) == self.mask.shape[1]

    def with_base(self, base: Tensor) -> "Text":
        """The same text with other rows."""
        return replace(self, base=base)


@dataclass(frozen=True)
class Socket:
    """A place in a pretrained network where a block reads text.

    Attributes:
        module: gets a forward pre-hook.
        argument: the argument of its ``forward`` that holds text.
        kind: ``replace``: the argument is projected text, the same for all blocks, and is replaced
            by P(x_s). ``residual``: the argument is a stream that P(base) went into, and
            P(x_s) - P(base) is added to it. ``raw``: the argument is unprojected text, to which the
            deviation is added.
        start: row of the argument at which the text begins, or how to find it: (argument, T) ->
        row. tap: number of the one base layer that it reads; None: all of them.
    """

    module: nn.Module
    argument: str
    kind: Literal["replace", "residual", "raw"] = "replace"
    start: int | Callable[[Tensor, int], int] = 0
    tap: int | None = None


def count_mixes(sockets: Sequence[Socket], where: str, num_taps: int) -> int:
    """Number of mixes that a router makes.

    Args:
        where: ``input``: one; ``taps``: one per base layer; ``blocks``: one per socket and base
            layer that it reads.
    """
    if where == "input":
        return 1
    if sockets[0].tap is not None:
        return len(sockets)
    return num_taps * (1 if where == "taps" else len(sockets))


def plain_latents(config: Any) -> tuple[int, int]:
    """Channels of latents, and the side of a patch, of a network that patches them itself."""
    patch = config.get("patch_size", 1)
    return config["in_channels"], patch if isinstance(patch, int) else patch[-1]


def packed_latents(config: Any) -> tuple[int, int]:
    """The same for one whose pipeline packs patches of 2 x 2 into channels."""
    return config["in_channels"] // 4, 2


def leave(_transformer: Any) -> None:
    """Most networks are ready to be trained."""


def single_tensor(given: Mapping[str, Tensor], _config: Any, dtype: torch.dtype) -> Text:
    """Text of a pipeline that gives its network one tensor ``prompt_embeds`` [B, T, H]."""
    return Text(given["prompt_embeds"][:, :, None].to(dtype), given["mask"])


def quarter(_config: Mapping[str, Any], _channels: int, height: int, width: int) -> int:
    """Tokens of an image in patches of 2 x 2 latent pixels."""
    return (height // 2) * (width // 2)


@dataclass(frozen=True)
class Family:
    """A family of pretrained transformers.

    Attributes:
        name: also of the preset that extracts its features, but for ``templates``.
        transformer: class in diffusers.
        pipelines: classes of pipelines in diffusers whose inputs are those below.
        sockets: transformer -> one socket per block, in order of execution.
        project: (transformer, [B, T, K, H], mask [B, T]) -> projected text [B, T, W]; P of the
            sockets' kinds.
        call: (transformer, x_t [B, C, h, w], t [B], text) -> what the network predicts, in the
            convention of ``path``: [B, C, h, w].
        base_layers: (number of LLM layers, ``model_index.json``, configuration of the transformer)
            -> LLM layers that the network reads.
        lora: names of the linear layers that get LoRA by default, as peft matches them.
        projection: names of the modules that P consists of.
        path: ``flow``: t is sigma, and the network's prediction is the velocity; ``ddpm``: steps
            of a DDPM, and the prediction is the noise.
        length: text is padded with zero rows to so many, which the network reads; None: padding is
            masked.
        needs_conditioning: the network reads padding rows or a second encoder, which only a
            conditioning store holds.
        interleaved: whether a row that the pipeline gives has all taps of a value side by side,
            [H * K], and not all values of a tap.
        fusion: the network's own weights of its layers: ``projector``, a module of its own, or
            ``gains``, one number per tap; None: it reads one layer.
        fusion_layer: the linear layer that these weights belong to, or that reads the taps side by
            side; its name in the transformer, and in ComfyUI. Empty: there is none.
        layers_setting: what a pipeline or transformer of diffusers calls the layers that it reads,
            where they can be set.
        image_tokens: (configuration of the transformer, C, h, w) -> length of the image for the
            pipeline's dynamic shift of t.
        text_width: configuration of the transformer -> H.
        latents: configuration of the transformer -> channels of latents, and the side of a patch.
        prepare: makes a transformer ready to be trained, without a change of what it computes.
        templates: presets of those of its pipelines that have one of their own.
        template: preset of the pipeline that was found; "" in the table.
        read_conditioning: (tensors of a conditioning store by name [B, ...], ``mask`` of the rows
            that are the captions' own among them; configuration of the transformer; dtype) -> text
            without lengths.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    sockets: Callable[[Any], list[Socket]]
    project: Callable[[Any, Tensor, Tensor], Tensor]
    call: Callable[[Any, Tensor, Tensor, Text], Tensor]
    base_layers: Callable[[int, Mapping[str, Any], Mapping[str, Any]], list[int]]
    text_width: Callable[[Mapping[str, Any]], int]
    lora: tuple[str, ...]
    projection: tuple[str, ...]
    path: Literal["flow", "ddpm"] = "flow"
    image_tokens: Callable[[Mapping[str, Any], int, int, int], int] = quarter
    latents: Callable[[Any], tuple[int, int]] = plain_latents
    read_conditioning: Callable[[Mapping[str, Tensor], Any, torch.dtype], Text] = single_tensor
    prepare: Callable[[Any], None] = leave
    templates: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    length: int | None = None
    needs_conditioning: bool = False
    interleaved: bool = False
    fusion: Literal["projector", "gains"] | None = None
    fusion_layer: tuple[str, str] = ("", "")
    layers_setting: str | None = None
