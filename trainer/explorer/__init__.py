"""Stores and runs as a widget of Jupyter."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "features": ["FeaturesView"],
        "runs": ["RunView"],
        "sides": ["explore"],
    },
)
