"""The diffusion transformer, and what its blocks read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dit": ["DiT"],
        "fusion": ["fuse", "layer_norm"],
        "router": ["Router", "entropy"],
        "strategies": ["Given", "make_router"],
    },
)
