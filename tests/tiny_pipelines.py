"""Complete diffusers pipelines with tiny random weights, one for each family of models.

Tokenizers, text encoders, transformer, VAE and scheduler are of the classes that the family's
repository on the Hub loads, and schedulers have its shift, so that ``encode_prompt`` and sampling
run for real. No family is missing. One part differs: FLUX.2 dev holds a ``PixtralProcessor``, which
asks for torchvision even for text; its tokenizer, with the same chat template, is there instead.
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import tiny_text_encoders as encoders
import tiny_tokenizers as tokenizers
import torch
import transformers
from tiny_text_encoders import WIDTH
from torch import nn

_QUERY_KEY_NORM = re.compile(r"norm_(added_)?[qk]\.weight")


def make_pipeline(family: str, folder: Path) -> Path:
    """Writes the pipeline of a family; the same bytes on every call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        pipeline = _BUILDERS[family]()
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module) and name != "vae":
                _fill(component)
    pipeline.save_pretrained(folder)
    return folder


def load_pipeline(folder: Path | str, *, without: Sequence[str] = (), dtype: Any = None) -> Any:
    """A pipeline as it was when it was first loaded: a copy, which takes a fraction of the time.

    Args:
        without: beginnings of the names of parts that are left out.
    """
    return copy.deepcopy(_loaded(Path(folder), tuple(without), dtype))


@functools.cache
def _loaded(folder: Path, without: tuple[str, ...], dtype: Any) -> Any:
    names = [part.name for part in folder.iterdir() if without and part.name.startswith(without)]
    options = {"dtype": dtype} if dtype is not None else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, **dict.fromkeys(names), **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_size(family: str) -> dict[str, Any]:
    """Keyword arguments of the pipeline for an image of 8 x 8 latent pixels (HiDream: 128 x 128):
    height and width, and what has no default that suits so few pixels and steps."""
    return _SIZES.get(family, {"height": 16, "width": 16})


def _fill(module: nn.Module) -> None:
    """Random parameters that pass signals on.

    Each layer changes what it reads, gates that are zero at initialisation are open, and attention
    is sharp enough for a few words among hundreds of padding rows to reach the output.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim < 2:
            sharper = 1.0 if _QUERY_KEY_NORM.search(name) else 0.0
            parameter.add_(sharper + 0.1 * noise)
        elif id(parameter) in embeddings or not name.endswith("weight"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))


# ---- VAEs


def _kl(kind: str = "AutoencoderKL", num_blocks: int = 2, **options: Any) -> Any:
    """2 pixels a latent pixel for 2 blocks, 4 for 3, 8 for 4."""
    if kind == "AutoencoderKL":
        options = {"scaling_factor": 0.36, "shift_factor": 0.12} | options
    vae = getattr(diffusers, kind)(
        block_out_channels=(8,) * num_blocks,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        **options,
    )
    if kind == "AutoencoderKLFlux2":
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _film(kind: str, temporal: list[bool], **options: Any) -> Any:
    """A VAE of videos; each entry of ``temporal`` halves height and width, a true one time too."""
    return getattr(diffusers, kind)(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * (len(temporal) + 1),
        num_res_blocks=1,
        temperal_downsample=temporal,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[2.0, 1.5, 2.5, 0.5],
        **options,
    )


# ---- Pipelines


def _pixart() -> Any:
    tokenizer = tokenizers.t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5("T5", tokenizer),
        vae=_kl(shift_factor=None),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
        ),
    )


def _sana() -> Any:
    tokenizer = tokenizers.gemma_tokenizer()
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.gemma2(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _qwen_image() -> Any:
    tokenizer = tokenizers.qwen_tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=_film("AutoencoderKLQwenImage", [False]),
        text_encoder=encoders.qwen_vl("Qwen2_5_VLForConditionalGeneration", tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _krea2() -> Any:
    """Reads layers 1, 3 and 5 of 6; the real one 2, 5, ... 35 of 36."""
    tokenizer = tokenizers.qwen_tokenizer()
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400
        ),
        vae=_film("AutoencoderKLQwenImage", [False]),
        text_encoder=encoders.qwen_vl("Qwen3VLModel", tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 3, 5),
    )


def _flux2_transformer(**options: Any) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **options,
    )


def _flux2_klein() -> Any:
    """Reads layers 9, 18 and 27 by default, so that its text encoder has 28."""
    tokenizer = tokenizers.qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        scheduler=_flux_scheduler(),
        vae=_kl("AutoencoderKLFlux2"),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**encoders.llm(tokenizer, 28))
        ),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(guidance_embeds=False),
    )


def _flux_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _flux2() -> Any:
    """Reads layers 10, 20 and 30 by default, so that its text encoder has 31."""
    tokenizer = tokenizers.mistral_tokenizer()
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **encoders.llm(tokenizer, 31)},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    return diffusers.Flux2Pipeline(
        scheduler=_flux_scheduler(),
        vae=_kl("AutoencoderKLFlux2"),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(),
    )


def _ideogram4() -> Any:
    """Reads layers 1, 4, ... 34 and 36, so that its text encoder has 36."""
    tokenizer = tokenizers.qwen_tokenizer()
    transformer, unconditional = (
        diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=13 * WIDTH,
            mrope_section=(3, 2, 2),
        )
        for _ in range(2)
    )
    return diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_kl("AutoencoderKLFlux2"),
        text_encoder=encoders.qwen_vl("Qwen3VLModel", tokenizer, 36),
        tokenizer=tokenizer,
        transformer=transformer,
        unconditional_transformer=unconditional,
    )


def _fibo() -> Any:
    tokenizer = tokenizers.smollm3_tokenizer()
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        axes_dims_rope=[4, 6, 6],
        text_encoder_dim=WIDTH,
    )
    return diffusers.BriaFiboPipeline(
        transformer=transformer,
        scheduler=_flux_scheduler(),
        vae=_film("AutoencoderKLWan", [False] * 4, scale_factor_spatial=16),
        text_encoder=transformers.SmolLM3ForCausalLM(
            transformers.SmolLM3Config(**encoders.llm(tokenizer) | {"vocab_size": 128_256})
        ),
        tokenizer=tokenizer,
    )


def _wan() -> Any:
    tokenizer = tokenizers.t5_tokenizer()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5("UMT5", tokenizer),
        vae=_film("AutoencoderKLWan", [True, True], scale_factor_spatial=4),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )


def _lumina2() -> Any:
    tokenizer = tokenizers.gemma_tokenizer()
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_kl(num_blocks=4),
        text_encoder=encoders.gemma2(tokenizer),
        tokenizer=tokenizer,
    )


def _z_image() -> Any:
    tokenizer = tokenizers.qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl(),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**encoders.llm(tokenizer))),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _hidream() -> Any:
    """Its four blocks read layers 1, 3, 5 and 6 of Llama."""
    clip, t5, llama = (
        tokenizers.clip_tokenizer(max_length=248),
        tokenizers.t5_tokenizer(),
        tokenizers.llama3_tokenizer(),
    )
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=16 + 16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        llama_layers=[0, 2, 4, 5],
        force_inference_output=True,
    )
    return diffusers.HiDreamImagePipeline(
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=_kl(),
        text_encoder=encoders.clip(clip, 16),
        tokenizer=clip,
        text_encoder_2=encoders.clip(clip, 16),
        tokenizer_2=clip,
        text_encoder_3=encoders.t5("T5", t5),
        tokenizer_3=t5,
        text_encoder_4=transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**encoders.llm(llama))
        ),
        tokenizer_4=llama,
        transformer=transformer,
    )


def _auraflow() -> Any:
    tokenizer = tokenizers.pile_t5_tokenizer()
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoders.t5("UMT5", tokenizer),
        vae=_kl(shift_factor=None),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _sd3() -> Any:
    """Rows of CLIP are 8 + 16 wide, padded to the 32 of T5."""
    clip, t5 = tokenizers.clip_tokenizer(), tokenizers.t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=8 + 16,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl(),
        text_encoder=encoders.clip(clip, 8),
        tokenizer=clip,
        text_encoder_2=encoders.clip(clip, 16),
        tokenizer_2=clip,
        text_encoder_3=encoders.t5("T5", t5),
        tokenizer_3=t5,
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "pixart": _pixart,
    "sana": _sana,
    "wan": _wan,
    "qwen-image": _qwen_image,
    "lumina2": _lumina2,
    "z-image": _z_image,
    "krea2": _krea2,
    "flux2": _flux2,
    "flux2-klein": _flux2_klein,
    "hidream": _hidream,
    "auraflow": _auraflow,
    "sd3": _sd3,
    "ideogram4": _ideogram4,
    "fibo": _fibo,
}
FAMILIES = tuple(_BUILDERS)
_SIZES: dict[str, dict[str, Any]] = {
    "pixart": {"height": 16, "width": 16, "use_resolution_binning": False},
    "sana": {"height": 32, "width": 32, "use_resolution_binning": False},
    "wan": {"height": 32, "width": 32, "num_frames": 5},
    "hidream": {"height": 256, "width": 256},  # it scales any size to 128 x 128 latent pixels
    "lumina2": {"height": 64, "width": 64},
    "ideogram4": {
        "height": 16,
        "width": 16,
        "max_sequence_length": 64,
        "guidance_scale": 4.0,
        "guidance_schedule": None,
    },
    "fibo": {"height": 128, "width": 128},
}
