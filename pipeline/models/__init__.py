"""Frozen networks: find, load and run them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "hub": ["ModelFiles", "find_model"],
        "llm": [
            "Encoder",
            "attention_of",
            "describe_model",
            "lay_out",
            "load_tokenizer",
            "parse_layers",
            "tokenizer_digest",
        ],
        "packing": ["check_packing", "supports_packing"],
        "text_pipelines": ["TextPipeline", "find_text_pipeline", "open_text_pipeline"],
        "text_recipes": ["RECIPES", "TextRecipe", "find_recipe"],
        "vae": ["Autoencoder", "find_vae", "latents_to_images", "open_decoder", "pixel_codec"],
    },
)
