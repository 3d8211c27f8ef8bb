"""What a store holds, how far it is, and what it would cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["figures"],
    submod_attrs={
        "against": ["Comparison", "compare_with_pipeline"],
        "describe": ["inspect"],
        "hub": ["push"],
        "linear_probe": ["probe_layers"],
        "report": ["write_report"],
        "statistics": ["CaptionLayers", "LayerStatistics", "measure_caption", "measure_layers"],
    },
)
