"""Complete diffusers pipelines with tiny random weights, one for each family of models.

Every class is the one that the family's repository on the Hub loads: tokenizers, text encoders,
transformer, VAE and scheduler, so that ``encode_prompt`` and sampling run for real.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import torch
import transformers
from torch import nn

WIDTH, NUM_LAYERS = 32, 6  # of text encoders, where the pipeline does not name deeper layers


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


def run_size(family: str) -> dict[str, Any]:
    """Keyword arguments for an image of 8 x 8 latent pixels, in about a second."""
    return _SIZES.get(family, {"height": 16, "width": 16})


def _fill(module: nn.Module) -> None:
    """Random parameters that pass signals on: each layer changes what it reads, and text and time
    reach the output, also through gates that are zero at initialisation."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        elif id(parameter) in embeddings or not name.endswith("weight"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))


# ---- Text encoders


def _llm(tokenizer: Any, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _t5(kind: str, tokenizer: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_heads=4,
        num_layers=NUM_LAYERS,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _gemma2(tokenizer: Any) -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**_llm(tokenizer), query_pre_attn_scalar=8)
    )


def _qwen_vl(kind: str, tokenizer: Any, num_layers: int = NUM_LAYERS) -> Any:
    """``kind``: name of a class of transformers, of Qwen2.5-VL or Qwen3-VL."""
    version = kind[: kind.index("VL") + 2]
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    if version == "Qwen3VL":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = _llm(tokenizer, num_layers) | {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 1e6,
        }
    }
    marks = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for name, mark in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    config = getattr(transformers, f"{version}Config")(
        text_config=text, vision_config=vision, **marks
    )
    return getattr(transformers, kind)(config)


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
        text_encoder=_t5("T5", tokenizer),
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
        text_encoder=_gemma2(tokenizer),
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
        text_encoder=_qwen_vl("Qwen2_5_VLForConditionalGeneration", tokenizer),
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
        text_encoder=_qwen_vl("Qwen3VLModel", tokenizer),
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
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_llm(tokenizer, 28))),
        tokenizer=tokenizer,
        transformer=_flux2_transformer(guidance_embeds=False),
    )


def _flux_scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


_BUILDERS: dict[str, Callable[[], Any]] = {
    "pixart": _pixart,
    "sana": _sana,
    "qwen-image": _qwen_image,
    "krea2": _krea2,
    "flux2-klein": _flux2_klein,
}
FAMILIES = tuple(_BUILDERS)
_SIZES: dict[str, dict[str, Any]] = {
    "pixart": {"height": 16, "width": 16, "use_resolution_binning": False},
    "sana": {"height": 32, "width": 32, "use_resolution_binning": False},
}
