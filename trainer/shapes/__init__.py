"""The toy dataset of coloured shapes, and an exact judge of its images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dataset": ["read_scenes", "write_world"],
        "images": ["render"],
        "judge": ["SKILLS", "judge_cells", "read_cells"],
        "scenes": ["Object", "Scene", "sample_scene"],
    },
)
