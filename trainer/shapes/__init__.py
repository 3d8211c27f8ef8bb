"""The toy dataset of coloured shapes, and its exact judge."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["read_scenes", "write_world"],
        "images": ["render"],
        "judge": ["judge_cells", "read_cells"],
        "scenes": ["Scene"],
    },
)
