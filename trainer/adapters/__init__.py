"""Routing into pretrained transformers of diffusers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Family", "Socket", "Text"],
        "families": ["FAMILIES", "find_family"],
        "pretrained": ["Pretrained", "find_pretrained", "load_transformer"],
        "routed": ["Routed"],
        "sockets": ["Sockets", "Source"],
    },
)
