"""The jobs that write stores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conditioning": ["encode_captions"],
        "driver": ["provenance"],
        "features": ["extract"],
        "latents": ["encode_images"],
        "plan": ["Plan", "make_plan"],
        "prompts": ["PromptEncoder"],
        "worker": ["encoder_of"],
    },
)
