"""How each network of diffusers takes an image, t and text, and where its blocks read text.

What a network is told, and what it predicts, is as its pipeline in diffusers 0.42 has it; latents
are packed, and positions made, by the pipelines' own functions.

Shapes: B batch, T text rows of the padded layout, K base layers that the network reads (taps), H
text width, W width of the network, C channels, h x w latent.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Socket, Text

Config = Mapping[str, Any]
CLIP_ROWS = 77
"""Rows of CLIP in front of those of T5, in SD3."""
FLUX2_TAPS = 3
"""Layers that FLUX.2 reads side by side."""
IDEOGRAM4_TAPS = 13
"""Layers that Ideogram 4 reads, value by value."""


# -------------------------------------------------------------------------------- cross-attention


def cross_attention(blocks: str) -> Any:
    def sockets(transformer: Any) -> list[Socket]:
        return [Socket(block, "encoder_hidden_states") for block in getattr(transformer, blocks)]

    return sockets


def project_pixart(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.caption_projection(rows[:, :, 0])


def call_pixart(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    config = transformer.config
    size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.use_additional_conditions:  # PixArt-alpha at 1024 pixels
        height, width = (8 * side for side in x.shape[-2:])
        size["resolution"] = x.new_tensor([height, width]).repeat(len(x), 1)
        size["aspect_ratio"] = x.new_tensor([height / width]).repeat(len(x), 1)
    out = transformer(
        x,
        encoder_hidden_states=text.base[:, :, 0],
        encoder_attention_mask=text.mask.long(),
        timestep=ddpm_step(t),
        added_cond_kwargs=size,
        return_dict=False,
    )[0]
    return out.chunk(2, dim=1)[0] if config.out_channels // 2 == x.shape[1] else out


def ddpm_step(t: Tensor) -> Tensor:
    """Step of a DDPM of 1,000, from 0: t of (step + 1) / 1000."""
    return (t * 1000).round().long() - 1


def project_sana(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.caption_norm(transformer.caption_projection(rows[:, :, 0]))


def call_sana(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    out = transformer(
        x,
        encoder_hidden_states=text.base[:, :, 0],
        encoder_attention_mask=text.mask.long(),
        timestep=1000 * t * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return out.chunk(2, dim=1)[0] if transformer.config.out_channels // 2 == x.shape[1] else out


def project_wan(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.condition_embedder.text_embedder(rows[:, :, 0])


def call_wan(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(
        x[:, :, None],  # a video of one frame
        timestep=1000 * t,
        encoder_hidden_states=text.base[:, :, 0],
        return_dict=False,
    )[0][:, :, 0]


# ------------------------------------------------------------------------------------- two streams


def joint(blocks: str, start: Any = 0) -> Any:
    def sockets(transformer: Any) -> list[Socket]:
        return [
            Socket(block, "encoder_hidden_states", "residual", start)
            for block in getattr(transformer, blocks)
        ]

    return sockets


def end(argument: Tensor, num_rows: int) -> int:
    """First row of a text that ends an argument."""
    return argument.shape[1] - num_rows


def project_context(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.context_embedder(rows.flatten(2))


def call_sd3(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(
        x,
        encoder_hidden_states=torch.cat([text.extras["clip"], text.base[:, :, 0]], dim=1),
        pooled_projections=text.extras["pooled_prompt_embeds"],
        timestep=1000 * t,
        return_dict=False,
    )[0]


def read_sd3(given: Mapping[str, Tensor], _config: Config, dtype: torch.dtype) -> Text:
    rows = given["prompt_embeds"].to(dtype)  # 77 rows of two CLIPs, then those of T5
    pooled = given["pooled_prompt_embeds"].to(dtype)
    return Text(
        rows[:, CLIP_ROWS:, None],
        given["mask"][:, CLIP_ROWS:],
        extras={"clip": rows[:, :CLIP_ROWS], "pooled_prompt_embeds": pooled},
    )


def sd3_tokens(config: Config, _channels: int, height: int, width: int) -> int:
    return (height // config["patch_size"]) * (width // config["patch_size"])


def project_qwen(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.txt_in(transformer.txt_norm(rows[:, :, 0]))


def call_qwen(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    from diffusers import QwenImagePipeline

    batch, channels, height, width = x.shape
    out = transformer(
        QwenImagePipeline._pack_latents(x, batch, channels, height, width),
        encoder_hidden_states=text.base[:, :, 0],
        encoder_hidden_states_mask=None if text.whole else text.mask,
        timestep=t,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        guidance=text.extras.get("guidance"),
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(out, height, width, 1)[:, :, 0]


def sockets_auraflow(transformer: Any) -> list[Socket]:
    start = transformer.register_tokens.shape[1]  # registers stand in front of the text
    joint, single = transformer.joint_transformer_blocks, transformer.single_transformer_blocks
    return [
        *(Socket(block, "encoder_hidden_states", "residual", start) for block in joint),
        *(Socket(block, "hidden_states", "residual", start) for block in single),
    ]


def call_auraflow(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(x, encoder_hidden_states=text.base[:, :, 0], timestep=t, return_dict=False)[
        0
    ]


def sockets_flux2(transformer: Any) -> list[Socket]:
    return [
        *joint("transformer_blocks")(transformer),
        *(
            Socket(block, "hidden_states", "residual")  # [text | image]
            for block in transformer.single_transformer_blocks
        ),
    ]


def call_flux2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    from diffusers import Flux2Pipeline

    embeds = text.base.flatten(2)  # layers side by side
    ids = Flux2Pipeline._prepare_latent_ids(x).to(x.device)
    out = transformer(
        hidden_states=Flux2Pipeline._pack_latents(x),
        encoder_hidden_states=embeds,
        timestep=t,
        img_ids=ids,
        txt_ids=Flux2Pipeline._prepare_text_ids(embeds[:1]).to(x.device),
        guidance=text.extras.get("guidance"),
        return_dict=False,
    )[0]
    return out.mT.unflatten(2, x.shape[2:])


def read_flux2(given: Mapping[str, Tensor], config: Config, dtype: torch.dtype) -> Text:
    embeds = given["prompt_embeds"].to(dtype)
    return Text(embeds.unflatten(2, (FLUX2_TAPS, -1)), given["mask"])


def flux2_layers(_num_layers: int, index: Config, _config: Config) -> list[int]:
    return [9, 18, 27] if "Klein" in index.get("_class_name", "") else [10, 20, 30]


# --------------------------------------------------------------------------------------- one stream


def sockets_lumina2(transformer: Any) -> list[Socket]:
    return [Socket(block, "hidden_states", "residual") for block in transformer.layers]


def project_lumina2(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.time_caption_embed.caption_embedder(rows[:, :, 0])


def call_lumina2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    # Told 1 - t, it predicts x0 - noise.
    return -transformer(
        x,
        timestep=1 - t,
        encoder_hidden_states=text.base[:, :, 0],
        encoder_attention_mask=text.mask,
        return_dict=False,
    )[0]


def lumina2_tokens(_config: Config, channels: int, _height: int, _width: int) -> int:
    return channels  # the pipeline takes its latents, which are not packed, for packed ones


def sockets_z_image(transformer: Any) -> list[Socket]:
    def start(argument: Tensor, num_rows: int) -> int:
        return argument.shape[1] - (num_rows + -num_rows % 32)  # [image | text], in 32s each

    return [Socket(block, "x", "residual", start) for block in transformer.layers]


def project_z_image(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.cap_embedder(rows[:, :, 0])


def call_z_image(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    captions = [rows[:num, 0] for rows, num in zip(text.base, text.lengths, strict=True)]
    # Told 1 - t, rounded as in its pipeline, it predicts x0 - noise.
    out = transformer([*x[:, :, None]], (1000 - 1000 * t) / 1000, captions, return_dict=False)[0]
    return -torch.stack(out)[:, :, 0]


def sockets_krea2(transformer: Any) -> list[Socket]:
    return [Socket(block, "hidden_states", "residual") for block in transformer.transformer_blocks]


def project_krea2(transformer: Any, rows: Tensor, mask: Tensor) -> Tensor:
    return transformer.txt_in(transformer.text_fusion(rows, attention_mask=mask[:, None, None]))


def call_krea2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    from diffusers import Krea2Pipeline, QwenImagePipeline

    batch, channels, height, width = x.shape
    positions = Krea2Pipeline.prepare_position_ids(
        text.mask.shape[1], height // 2, width // 2, x.device
    )
    out = transformer(
        QwenImagePipeline._pack_latents(x, batch, channels, height, width),
        encoder_hidden_states=text.base,
        timestep=t,
        position_ids=positions,
        encoder_attention_mask=text.mask,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(out, height, width, 1)[:, :, 0]


def read_krea2(given: Mapping[str, Tensor], _config: Config, dtype: torch.dtype) -> Text:
    return Text(given["prompt_embeds"].to(dtype), given["mask"])  # [B, T, K, H] as it is


def krea2_layers(_num_layers: int, index: Config, _config: Config) -> list[int]:
    return [*index.get("text_encoder_select_layers", range(2, 36, 3))]


def sockets_ideogram4(transformer: Any) -> list[Socket]:
    return [Socket(block, "hidden_states", "residual") for block in transformer.layers]


def project_ideogram4(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.llm_cond_proj(transformer.llm_cond_norm(rows.mT.flatten(2)))


def call_ideogram4(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    from diffusers import Ideogram4Pipeline
    from diffusers.models.transformers import transformer_ideogram4 as roles

    batch, _, height, width = x.shape
    num, image = text.mask.shape[1], x.flatten(2).mT  # [B, N, C]
    # [text | image], and padding in a segment of its own; the pipeline has it in front.
    grid, segment, role = Ideogram4Pipeline._prepare_ids([0] * batch, height, width, 0, x.device)
    own = text.mask.long()
    count = (own.cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, 3)
    embeds = text.base.mT.flatten(2)  # values of all layers side by side
    out = transformer(
        torch.cat([image.new_zeros(batch, num, image.shape[2]), image], dim=1),
        timestep=1 - t,
        encoder_hidden_states=torch.nn.functional.pad(embeds, (0, 0, 0, image.shape[1])),
        position_ids=torch.cat([count, grid], dim=1),
        segment_ids=torch.cat([own - (1 - own), segment], dim=1),
        indicator=torch.cat([own * roles.LLM_TOKEN_INDICATOR, role], dim=1),
        return_dict=False,
    )[0]
    return -out[:, num:].mT.unflatten(2, (height, width))  # it predicts x0 - noise


def ideogram4_layers(num_layers: int, _index: Config, _config: Config) -> list[int]:
    """The last layer before the final norm counts as L + 1."""
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

    layers = [block + 1 for block in QWEN3_VL_ACTIVATION_LAYERS]
    return [num_layers + 1 if layer == num_layers else layer for layer in layers]


# ------------------------------------------------------------------------------- an input per block


def sockets_hidream(transformer: Any) -> list[Socket]:
    chosen = transformer.config.llama_layers
    taps = sorted({*chosen})
    projections = [*transformer.caption_projection][: len(chosen)]
    return [
        Socket(projection, "caption", "raw", tap=taps.index(layer))
        for projection, layer in zip(projections, chosen, strict=True)
    ]


def call_hidream(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    taps = sorted({*transformer.config.llama_layers})
    rows: list[Tensor | None] = [None] * (taps[-1] + 1)
    for number, layer in enumerate(taps):
        rows[layer] = text.base[:, :, number]
    return -transformer(
        x,
        timesteps=1000 * t,
        encoder_hidden_states_t5=text.extras["prompt_embeds_t5"],
        encoder_hidden_states_llama3=rows,
        pooled_embeds=text.extras["pooled_prompt_embeds"],
        return_dict=False,
    )[0]


def read_hidream(given: Mapping[str, Tensor], config: Config, dtype: torch.dtype) -> Text:
    taps = sorted({*config["llama_layers"]})
    rows = given["prompt_embeds_llama3"].to(dtype)  # [B, T, blocks of the LLM, H]
    names = ("prompt_embeds_t5", "pooled_prompt_embeds")
    extras = {name: given[name].to(dtype) for name in names}
    return Text(rows[:, :, taps], given["mask"], extras=extras)


def prepare_hidream(transformer: Any) -> None:
    """Let gradients through the experts, which diffusers runs without outside of training mode."""
    for module in transformer.modules():
        if hasattr(module, "moe_infer"):
            module.moe_infer = partial(_mix_experts, module)


def _mix_experts(module: Any, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """As ``moe_infer`` of diffusers, to the bit: [N, W], expert of each row and choice [N k], its
    weight [N k, 1] -> [N, W]."""
    mixed = torch.zeros_like(x)
    for number, expert in enumerate(module.experts):
        chosen = (experts == number).nonzero()[:, 0]
        rows = chosen // module.num_activated_experts
        own = expert(x[rows])
        own = (own * weights[chosen]).to(own.dtype)
        mixed = mixed.to(own.dtype).index_add(0, rows, own)
    return mixed


def hidream_layers(_num_layers: int, _index: Config, config: Config) -> list[int]:
    return [layer + 1 for layer in sorted({*config["llama_layers"]})]  # it counts from block 0


def hidream_tokens(config: Config, _channels: int, _height: int, _width: int) -> int:
    height, width = config["max_resolution"]
    return height * width // config["patch_size"] ** 2


def sockets_fibo(transformer: Any) -> list[Socket]:
    """A tap per block: blocks beyond the LLM's layers read its last one again."""
    projections = transformer.caption_projection
    return [Socket(each, "caption", "raw", tap=number) for number, each in enumerate(projections)]


def call_fibo(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    from diffusers import BriaFiboPipeline

    batch, _, height, width = x.shape
    last = max(text.layers)
    both = [text.base[:, :, text.layers.index(layer)] for layer in (last, last - 1)]
    image = x.flatten(2).mT
    mask = torch.cat([text.mask, text.mask.new_ones(image.shape[:2])], dim=1)
    places = BriaFiboPipeline._prepare_latent_image_ids(batch, height, width, x.device, x.dtype)
    out = transformer(
        image,
        encoder_hidden_states=torch.cat(both, dim=-1),
        text_encoder_layers=[*text.base.unbind(2)],
        timestep=1000 * t,
        img_ids=places,
        txt_ids=x.new_zeros(text.mask.shape[1], 3),
        joint_attention_kwargs={} if text.whole else {"attention_mask": mask[:, None, None]},
        return_dict=False,
    )[0]
    return out.mT.unflatten(2, (height, width))


def fibo_layers(num_layers: int, _index: Config, config: Config) -> list[int]:
    """As its pipeline gives blocks their layers, the first of which is the embedding."""
    num_blocks = config["num_layers"] + config["num_single_layers"]
    skipped = max(num_layers + 1 - num_blocks, 0)
    return [min(skipped + number, num_layers) for number in range(num_blocks)]


def no_projection(_transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return rows


def last(num_layers: int, _index: Config, _config: Config) -> list[int]:
    return [num_layers]


def penultimate(num_layers: int, _index: Config, _config: Config) -> list[int]:
    return [num_layers - 1]
