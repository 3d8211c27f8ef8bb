"""The families of pretrained transformers that can be routed, as a table.

What a network is told, and what it predicts, is as its pipeline in diffusers 0.42 has it; latents
are packed, and positions made, by the pipelines' own functions.

Left out: Chroma, whose pipeline passes a mask that hides nothing and whose single blocks get none
under gradient checkpointing (diffusers issue 13619), so that there is no one network to anchor to;
and CogView4, whose text depends on the other captions of a batch.

Shapes: B batch, T text rows of the padded layout, K base layers that the network reads (taps), H
text width, W width of the network, C channels, h x w latent.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ...schemas import InputError
from .base import Family, Socket, Text, packed_latents

Config = Mapping[str, Any]
CLIP_ROWS = 77
"""Rows of CLIP in front of those of T5, in SD3."""
FLUX2_TAPS = 3
"""Layers that FLUX.2 reads side by side."""


# -------------------------------------------------------------------------------- cross-attention


def _cross_attention(blocks: str) -> Any:
    def sockets(transformer: Any) -> list[Socket]:
        return [Socket(block, "encoder_hidden_states") for block in getattr(transformer, blocks)]

    return sockets


def _project_pixart(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.caption_projection(rows[:, :, 0])


def _call_pixart(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
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


def _project_sana(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.caption_norm(transformer.caption_projection(rows[:, :, 0]))


def _call_sana(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    out = transformer(
        x,
        encoder_hidden_states=text.base[:, :, 0],
        encoder_attention_mask=text.mask.long(),
        timestep=1000 * t * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return out.chunk(2, dim=1)[0] if transformer.config.out_channels // 2 == x.shape[1] else out


def _project_wan(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.condition_embedder.text_embedder(rows[:, :, 0])


def _call_wan(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(
        x[:, :, None],  # a video of one frame
        timestep=1000 * t,
        encoder_hidden_states=text.base[:, :, 0],
        return_dict=False,
    )[0][:, :, 0]


# ------------------------------------------------------------------------------------- two streams


def _joint(blocks: str, start: Any = 0) -> Any:
    def sockets(transformer: Any) -> list[Socket]:
        return [
            Socket(block, "encoder_hidden_states", "residual", start)
            for block in getattr(transformer, blocks)
        ]

    return sockets


def _end(argument: Tensor, num_rows: int) -> int:
    """First row of a text that ends an argument."""
    return argument.shape[1] - num_rows


def _project_context(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.context_embedder(rows.flatten(2))


def _call_sd3(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(
        x,
        encoder_hidden_states=torch.cat([text.extras["clip"], text.base[:, :, 0]], dim=1),
        pooled_projections=text.extras["pooled_prompt_embeds"],
        timestep=1000 * t,
        return_dict=False,
    )[0]


def _read_sd3(given: Mapping[str, Tensor], _config: Config, dtype: torch.dtype) -> Text:
    rows = given["prompt_embeds"].to(dtype)  # 77 rows of two CLIPs, then those of T5
    pooled = given["pooled_prompt_embeds"].to(dtype)
    return Text(
        rows[:, CLIP_ROWS:, None],
        given["mask"][:, CLIP_ROWS:],
        extras={"clip": rows[:, :CLIP_ROWS], "pooled_prompt_embeds": pooled},
    )


def _sd3_tokens(config: Config, _channels: int, height: int, width: int) -> int:
    return (height // config["patch_size"]) * (width // config["patch_size"])


def _project_qwen(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.txt_in(transformer.txt_norm(rows[:, :, 0]))


def _call_qwen(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
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


def _sockets_auraflow(transformer: Any) -> list[Socket]:
    start = transformer.register_tokens.shape[1]  # registers stand in front of the text
    joint, single = transformer.joint_transformer_blocks, transformer.single_transformer_blocks
    return [
        *(Socket(block, "encoder_hidden_states", "residual", start) for block in joint),
        *(Socket(block, "hidden_states", "residual", start) for block in single),
    ]


def _call_auraflow(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    return transformer(x, encoder_hidden_states=text.base[:, :, 0], timestep=t, return_dict=False)[
        0
    ]


def _sockets_flux2(transformer: Any) -> list[Socket]:
    return [
        *_joint("transformer_blocks")(transformer),
        *(
            Socket(block, "hidden_states", "residual")  # [text | image]
            for block in transformer.single_transformer_blocks
        ),
    ]


def _call_flux2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
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


def _read_flux2(given: Mapping[str, Tensor], config: Config, dtype: torch.dtype) -> Text:
    embeds = given["prompt_embeds"].to(dtype)
    return Text(embeds.unflatten(2, (FLUX2_TAPS, -1)), given["mask"])


def _flux2_layers(_num_layers: int, index: Config, _config: Config) -> list[int]:
    return [9, 18, 27] if "Klein" in index.get("_class_name", "") else [10, 20, 30]


# --------------------------------------------------------------------------------------- one stream


def _sockets_lumina2(transformer: Any) -> list[Socket]:
    return [Socket(block, "hidden_states", "residual") for block in transformer.layers]


def _project_lumina2(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.time_caption_embed.caption_embedder(rows[:, :, 0])


def _call_lumina2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    # Told 1 - t, it predicts x0 - noise.
    return -transformer(
        x,
        timestep=1 - t,
        encoder_hidden_states=text.base[:, :, 0],
        encoder_attention_mask=text.mask,
        return_dict=False,
    )[0]


def _lumina2_tokens(_config: Config, channels: int, _height: int, _width: int) -> int:
    return channels  # the pipeline takes its latents, which are not packed, for packed ones


def _sockets_z_image(transformer: Any) -> list[Socket]:
    def start(argument: Tensor, num_rows: int) -> int:
        return argument.shape[1] - (num_rows + -num_rows % 32)  # [image | text], in 32s each

    return [Socket(block, "x", "residual", start) for block in transformer.layers]


def _project_z_image(transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return transformer.cap_embedder(rows[:, :, 0])


def _call_z_image(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
    captions = [rows[:num, 0] for rows, num in zip(text.base, text.lengths, strict=True)]
    # Told 1 - t, rounded as in its pipeline, it predicts x0 - noise.
    out = transformer([*x[:, :, None]], (1000 - 1000 * t) / 1000, captions, return_dict=False)[0]
    return -torch.stack(out)[:, :, 0]


def _sockets_krea2(transformer: Any) -> list[Socket]:
    return [Socket(block, "hidden_states", "residual") for block in transformer.transformer_blocks]


def _project_krea2(transformer: Any, rows: Tensor, mask: Tensor) -> Tensor:
    return transformer.txt_in(transformer.text_fusion(rows, attention_mask=mask[:, None, None]))


def _call_krea2(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
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


def _read_krea2(given: Mapping[str, Tensor], _config: Config, dtype: torch.dtype) -> Text:
    return Text(given["prompt_embeds"].to(dtype), given["mask"])  # [B, T, K, H] as it is


def _krea2_layers(_num_layers: int, index: Config, _config: Config) -> list[int]:
    return [*index.get("text_encoder_select_layers", range(2, 36, 3))]


# ------------------------------------------------------------------------------- an input per block


def _sockets_hidream(transformer: Any) -> list[Socket]:
    chosen = transformer.config.llama_layers
    taps = sorted({*chosen})
    projections = [*transformer.caption_projection][: len(chosen)]
    return [
        Socket(projection, "caption", "raw", tap=taps.index(layer))
        for projection, layer in zip(projections, chosen, strict=True)
    ]


def _call_hidream(transformer: Any, x: Tensor, t: Tensor, text: Text) -> Tensor:
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


def _read_hidream(given: Mapping[str, Tensor], config: Config, dtype: torch.dtype) -> Text:
    taps = sorted({*config["llama_layers"]})
    rows = given["prompt_embeds_llama3"].to(dtype)  # [B, T, blocks of the LLM, H]
    names = ("prompt_embeds_t5", "pooled_prompt_embeds")
    extras = {name: given[name].to(dtype) for name in names}
    return Text(rows[:, :, taps], given["mask"], extras=extras)


def _prepare_hidream(transformer: Any) -> None:
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


def _hidream_layers(_num_layers: int, _index: Config, config: Config) -> list[int]:
    return [layer + 1 for layer in sorted({*config["llama_layers"]})]  # it counts from block 0


def _hidream_tokens(config: Config, _channels: int, _height: int, _width: int) -> int:
    height, width = config["max_resolution"]
    return height * width // config["patch_size"] ** 2


# -------------------------------------------------------------------------------------------- table


def _no_projection(_transformer: Any, rows: Tensor, _mask: Tensor) -> Tensor:
    return rows


def _last(num_layers: int, _index: Config, _config: Config) -> list[int]:
    return [num_layers]


def _penultimate(num_layers: int, _index: Config, _config: Config) -> list[int]:
    return [num_layers - 1]


_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE = ("to_q", "to_k", "to_v", "to_out.0")

FAMILIES = (
    Family(
        name="pixart",
        transformer="PixArtTransformer2DModel",
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        sockets=_cross_attention("transformer_blocks"),
        project=_project_pixart,
        call=_call_pixart,
        base_layers=_last,
        text_width=itemgetter("caption_channels"),
        lora=_CROSS,
        projection=("caption_projection",),
        path="ddpm",
    ),
    Family(
        name="sana",
        transformer="SanaTransformer2DModel",
        pipelines=("SanaPipeline", "SanaPAGPipeline"),
        sockets=_cross_attention("transformer_blocks"),
        project=_project_sana,
        call=_call_sana,
        base_layers=_last,
        text_width=itemgetter("caption_channels"),
        lora=_CROSS,
        projection=("caption_projection", "caption_norm"),
    ),
    Family(
        name="wan",
        transformer="WanTransformer3DModel",
        pipelines=("WanPipeline",),
        sockets=_cross_attention("blocks"),
        project=_project_wan,
        call=_call_wan,
        base_layers=_last,
        text_width=itemgetter("text_dim"),
        lora=_CROSS,
        projection=("condition_embedder.text_embedder",),
        length=512,
    ),
    Family(
        name="sd3",
        transformer="SD3Transformer2DModel",
        pipelines=("StableDiffusion3Pipeline",),
        sockets=_joint("transformer_blocks", _end),
        project=_project_context,
        call=_call_sd3,
        base_layers=_last,
        text_width=itemgetter("joint_attention_dim"),
        lora=_JOINT,
        projection=("context_embedder",),
        image_tokens=_sd3_tokens,
        read_conditioning=_read_sd3,
        needs_conditioning=True,
    ),
    Family(
        name="qwen-image",
        transformer="QwenImageTransformer2DModel",
        pipelines=("QwenImagePipeline",),
        sockets=_joint("transformer_blocks"),
        project=_project_qwen,
        call=_call_qwen,
        base_layers=_last,
        text_width=itemgetter("joint_attention_dim"),
        lora=_JOINT,
        projection=("txt_norm", "txt_in"),
        latents=packed_latents,
    ),
    Family(
        name="auraflow",
        transformer="AuraFlowTransformer2DModel",
        pipelines=("AuraFlowPipeline",),
        sockets=_sockets_auraflow,
        project=_project_context,
        call=_call_auraflow,
        base_layers=_last,
        text_width=itemgetter("joint_attention_dim"),
        lora=_JOINT,
        projection=("context_embedder",),
        length=256,
    ),
    Family(
        name="flux2",
        transformer="Flux2Transformer2DModel",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        templates={"Flux2KleinPipeline": "flux2-klein"},
        sockets=_sockets_flux2,
        project=_project_context,
        call=_call_flux2,
        base_layers=_flux2_layers,
        text_width=lambda config: config["joint_attention_dim"] // FLUX2_TAPS,
        lora=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_qkv_mlp_proj"),
        projection=("context_embedder",),
        image_tokens=lambda _config, _channels, height, width: height * width,
        latents=lambda config: (config["in_channels"], 1),
        read_conditioning=_read_flux2,
        needs_conditioning=True,
        fusion="gains",
        fusion_layer=("context_embedder", "txt_in"),
        layers_setting="text_encoder_out_layers",
    ),
    Family(
        name="lumina2",
        transformer="Lumina2Transformer2DModel",
        pipelines=("Lumina2Pipeline",),
        sockets=_sockets_lumina2,
        project=_project_lumina2,
        call=_call_lumina2,
        base_layers=_penultimate,
        text_width=itemgetter("cap_feat_dim"),
        lora=_SINGLE,
        projection=("time_caption_embed.caption_embedder",),
        image_tokens=_lumina2_tokens,
    ),
    Family(
        name="z-image",
        transformer="ZImageTransformer2DModel",
        pipelines=("ZImagePipeline",),
        sockets=_sockets_z_image,
        project=_project_z_image,
        call=_call_z_image,
        base_layers=_penultimate,
        text_width=itemgetter("cap_feat_dim"),
        lora=_SINGLE,
        projection=("cap_embedder",),
        latents=lambda config: (config["in_channels"], 2),
    ),
    Family(
        name="krea2",
        transformer="Krea2Transformer2DModel",
        pipelines=("Krea2Pipeline",),
        sockets=_sockets_krea2,
        project=_project_krea2,
        call=_call_krea2,
        base_layers=_krea2_layers,
        text_width=itemgetter("text_hidden_dim"),
        lora=_SINGLE,
        projection=("text_fusion", "txt_in"),
        latents=packed_latents,
        read_conditioning=_read_krea2,
        fusion="projector",
        fusion_layer=("text_fusion.projector", "txtfusion.projector"),
        layers_setting="text_encoder_select_layers",
    ),
    Family(
        name="hidream",
        transformer="HiDreamImageTransformer2DModel",
        pipelines=("HiDreamImagePipeline",),
        sockets=_sockets_hidream,
        project=_no_projection,
        call=_call_hidream,
        base_layers=_hidream_layers,
        text_width=lambda config: config["caption_channels"][1],
        lora=("to_q", "to_k", "to_v", "to_q_t", "to_k_t", "to_v_t"),
        projection=("caption_projection",),
        image_tokens=_hidream_tokens,
        read_conditioning=_read_hidream,
        prepare=_prepare_hidream,
        needs_conditioning=True,
        layers_setting="llama_layers",
    ),
)
"""One entry per family; the class of its transformer identifies it."""

LEFT_OUT = {
    "ChromaTransformer2DModel": "its mask of padding rows has no effect in the pipeline, and its "
    "single blocks get none under gradient checkpointing (diffusers issue 13619)",
    "CogView4Transformer2DModel": "its text depends on the other captions of a batch",
}
"""Classes of diffusers that are refused, and why."""


def find_family(transformer: str, name: str, pipeline: str | None = None) -> Family:
    """The family of a class of transformers in diffusers.

    Args:
        name: of the pretrained model, for the message.
        pipeline: class of its pipeline in diffusers, if known.

    Raises:
        InputError: it is of no known family, or its pipeline gives it other inputs; with the list.
    """
    for family in FAMILIES:
        if family.transformer != transformer:
            continue
        if pipeline is None or pipeline in family.pipelines:
            template = family.templates.get(pipeline or "", family.name)
            return replace(family, template=template)
        raise InputError(
            f"{name}: {pipeline} cannot be adapted: its inputs, or what it makes of predictions, "
            f"are not those of family {family.name}. Expected {' or '.join(family.pipelines)}."
        )
    known = ", ".join(f"{family.transformer} ({family.name})" for family in FAMILIES)
    reason = LEFT_OUT.get(transformer, "no adapter is made for this class")
    raise InputError(f"{name}: {transformer} cannot be adapted: {reason}. Expected one of {known}.")
