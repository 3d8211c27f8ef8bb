"""Text encoders of six layers and width 32, of the classes that diffusers pipelines load."""

from typing import Any

import transformers

WIDTH, NUM_LAYERS = 32, 6


def llm(tokenizer: Any, num_layers: int = NUM_LAYERS) -> dict[str, Any]:
    # Attention over 2,048 tokens of padding in each of 36 layers takes seconds per head.
    num_heads, num_kv_heads = (4, 2) if num_layers <= NUM_LAYERS else (1, 1)
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def t5(kind: str, tokenizer: Any) -> Any:
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


def gemma2(tokenizer: Any) -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**llm(tokenizer), query_pre_attn_scalar=8)
    )


def qwen_vl(kind: str, tokenizer: Any, num_layers: int = NUM_LAYERS) -> Any:
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
    text = llm(tokenizer, num_layers) | {
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


def clip(tokenizer: Any, width: int) -> Any:
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=32,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
