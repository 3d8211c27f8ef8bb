"""The families of pretrained transformers that can be routed, as a table.

Left out: Chroma, whose pipeline passes a mask that hides nothing and whose single blocks get none
under gradient checkpointing (diffusers issue 13619), so that there is no one network to anchor to;
and CogView4, whose text depends on the other captions of a batch.
"""

from dataclasses import replace
from operator import itemgetter

from ...schemas import InputError
from . import networks
from .base import Family, packed_latents

_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE = ("to_q", "to_k", "to_v", "to_out.0")

FAMILIES = (
    Family(
        name="pixart",
        transformer="PixArtTransformer2DModel",
        pipelines=("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
        sockets=networks.cross_attention("transformer_blocks"),
        project=networks.project_pixart,
        call=networks.call_pixart,
        base_layers=networks.last,
        text_width=itemgetter("caption_channels"),
        lora=_CROSS,
        projection=("caption_projection",),
        path="ddpm",
    ),
    Family(
        name="sana",
        transformer="SanaTransformer2DModel",
        pipelines=("SanaPipeline", "SanaPAGPipeline"),
        sockets=networks.cross_attention("transformer_blocks"),
        project=networks.project_sana,
        call=networks.call_sana,
        base_layers=networks.last,
        text_width=itemgetter("caption_channels"),
        lora=_CROSS,
        projection=("caption_projection", "caption_norm"),
    ),
    Family(
        name="wan",
        transformer="WanTransformer3DModel",
        pipelines=("WanPipeline",),
        sockets=networks.cross_attention("blocks"),
        project=networks.project_wan,
        call=networks.call_wan,
        base_layers=networks.last,
        text_width=itemgetter("text_dim"),
        lora=_CROSS,
        projection=("condition_embedder.text_embedder",),
        length=512,
    ),
    Family(
        name="sd3",
        transformer="SD3Transformer2DModel",
        pipelines=("StableDiffusion3Pipeline",),
        sockets=networks.joint("transformer_blocks", networks.end),
        project=networks.project_context,
        call=networks.call_sd3,
        base_layers=networks.last,
        text_width=itemgetter("joint_attention_dim"),
        lora=_JOINT,
        projection=("context_embedder",),
        image_tokens=networks.sd3_tokens,
        read_conditioning=networks.read_sd3,
        needs_conditioning=True,
    ),
    Family(
        name="qwen-image",
        transformer="QwenImageTransformer2DModel",
        pipelines=("QwenImagePipeline",),
        sockets=networks.joint("transformer_blocks"),
        project=networks.project_qwen,
        call=networks.call_qwen,
        base_layers=networks.last,
        text_width=itemgetter("joint_attention_dim"),
        lora=_JOINT,
        projection=("txt_norm", "txt_in"),
        latents=packed_latents,
    ),
    Family(
        name="auraflow",
        transformer="AuraFlowTransformer2DModel",
        pipelines=("AuraFlowPipeline",),
        sockets=networks.sockets_auraflow,
        project=networks.project_context,
        call=networks.call_auraflow,
        base_layers=networks.last,
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
        sockets=networks.sockets_flux2,
        project=networks.project_context,
        call=networks.call_flux2,
        base_layers=networks.flux2_layers,
        text_width=lambda config: config["joint_attention_dim"] // networks.FLUX2_TAPS,
        lora=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_qkv_mlp_proj"),
        projection=("context_embedder",),
        image_tokens=lambda _config, _channels, height, width: height * width,
        latents=lambda config: (config["in_channels"], 1),
        read_conditioning=networks.read_flux2,
        needs_conditioning=True,
        fusion="gains",
        fusion_layer=("context_embedder", "txt_in"),
        layers_setting="text_encoder_out_layers",
    ),
    Family(
        name="lumina2",
        transformer="Lumina2Transformer2DModel",
        pipelines=("Lumina2Pipeline",),
        sockets=networks.sockets_lumina2,
        project=networks.project_lumina2,
        call=networks.call_lumina2,
        base_layers=networks.penultimate,
        text_width=itemgetter("cap_feat_dim"),
        lora=_SINGLE,
        projection=("time_caption_embed.caption_embedder",),
        image_tokens=networks.lumina2_tokens,
    ),
    Family(
        name="z-image",
        transformer="ZImageTransformer2DModel",
        pipelines=("ZImagePipeline",),
        sockets=networks.sockets_z_image,
        project=networks.project_z_image,
        call=networks.call_z_image,
        base_layers=networks.penultimate,
        text_width=itemgetter("cap_feat_dim"),
        lora=_SINGLE,
        projection=("cap_embedder",),
        latents=lambda config: (config["in_channels"], 2),
    ),
    Family(
        name="krea2",
        transformer="Krea2Transformer2DModel",
        pipelines=("Krea2Pipeline",),
        sockets=networks.sockets_krea2,
        project=networks.project_krea2,
        call=networks.call_krea2,
        base_layers=networks.krea2_layers,
        text_width=itemgetter("text_hidden_dim"),
        lora=_SINGLE,
        projection=("text_fusion", "txt_in"),
        latents=packed_latents,
        read_conditioning=networks.read_krea2,
        fusion="projector",
        fusion_layer=("text_fusion.projector", "txtfusion.projector"),
        layers_setting="text_encoder_select_layers",
    ),
    Family(
        name="ideogram4",
        transformer="Ideogram4Transformer2DModel",
        pipelines=("Ideogram4Pipeline",),
        sockets=networks.sockets_ideogram4,
        project=networks.project_ideogram4,
        call=networks.call_ideogram4,
        base_layers=networks.ideogram4_layers,
        text_width=lambda config: config["llm_features_dim"] // networks.IDEOGRAM4_TAPS,
        lora=_SINGLE,
        projection=("llm_cond_norm", "llm_cond_proj"),
        latents=lambda config: (config["in_channels"], 1),
        interleaved=True,
        fusion="gains",
    ),
    Family(
        name="hidream",
        transformer="HiDreamImageTransformer2DModel",
        pipelines=("HiDreamImagePipeline",),
        sockets=networks.sockets_hidream,
        project=networks.no_projection,
        call=networks.call_hidream,
        base_layers=networks.hidream_layers,
        text_width=lambda config: config["caption_channels"][1],
        lora=("to_q", "to_k", "to_v", "to_q_t", "to_k_t", "to_v_t"),
        projection=("caption_projection",),
        image_tokens=networks.hidream_tokens,
        read_conditioning=networks.read_hidream,
        prepare=networks.prepare_hidream,
        needs_conditioning=True,
        layers_setting="llama_layers",
    ),
    Family(
        name="fibo",
        transformer="BriaFiboTransformer2DModel",
        pipelines=("BriaFiboPipeline",),
        sockets=networks.sockets_fibo,
        project=networks.no_projection,
        call=networks.call_fibo,
        base_layers=networks.fibo_layers,
        text_width=itemgetter("text_encoder_dim"),
        lora=_JOINT,
        projection=("context_embedder", "caption_projection"),
        latents=lambda config: (config["in_channels"], 1),
        image_tokens=lambda _config, _channels, height, width: height * width,
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
