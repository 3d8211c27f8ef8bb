"""Routing into pretrained transformers of diffusers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["ARGUMENTS", "Arguments"],
        "base": ["Family", "Socket", "Text"],
        "captures": ["Captures"],
        "families": ["FAMILIES", "find_family"],
        "pipeline": ["Attachment", "TextReader"],
        "pretrained": ["Pretrained", "find_pretrained", "load_transformer"],
        "routed": ["Routed"],
        "sockets": ["Sockets", "Source"],
    },
)
