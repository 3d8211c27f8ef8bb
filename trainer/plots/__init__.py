"""Figures from arrays and tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["sample_grid", "save_images"],
        "runs": ["curves_of_runs", "loss_by_t", "routing_of_runs"],
    },
)
