"""Figures from arrays and tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["layer_weights", "lora_sizes"],
        "images": ["sample_grid", "save_images"],
        "routing": ["routing_heatmap", "routing_over_steps", "routing_over_time"],
        "runs": ["curves_of_runs", "loss_by_t", "routing_of_runs"],
        "scores": ["accuracy_bars"],
        "training": ["loss_curve", "validation_curves"],
    },
)
