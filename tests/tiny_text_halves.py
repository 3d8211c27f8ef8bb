"""Text halves of video pipelines of diffusers: tokenizers and tiny random text encoders."""

import json
from pathlib import Path
from typing import Any

import tiny_text_encoders as encoders
import tiny_tokenizers as tokenizers
import torch
import transformers

VIDEO_FAMILIES = ("ltx2", "cosmos")
_CLASSES = {"ltx2": "LTX2Pipeline", "cosmos": "Cosmos2_5_PredictBasePipeline"}


def make_text_half(family: str, folder: Path) -> Path:
    """Writes tokenizer, text encoder and index of a pipeline; the same bytes on every call."""
    tokenizer: Any
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if family == "ltx2":
            tokenizer = tokenizers.gemma_tokenizer()
            llm = _gemma3(tokenizer)
        else:
            tokenizer = tokenizers.qwen_tokenizer()
            llm = encoders.qwen_vl("Qwen2_5_VLForConditionalGeneration", tokenizer)
        for parameter in llm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    tokenizer.save_pretrained(folder / "tokenizer")
    llm.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": _CLASSES[family],
        "_diffusers_version": "0.42.1",
        "text_encoder": ["transformers", type(llm).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", "AutoModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _gemma3(tokenizer: Any) -> Any:
    text = encoders.llm(tokenizer) | {"query_pre_attn_scalar": 8, "sliding_window": 64}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)
