"""The diffusion transformer, and the strategies that mix LLM layers for its blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dit": ["DiT"],
        "fusion": ["fuse", "layer_norm"],
        "router": ["Learned", "Router", "entropy"],
        "strategies": ["Given", "make_router"],
    },
)
