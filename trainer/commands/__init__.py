"""The commands that train and look at runs, a file per group."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "runs": ["compare", "export", "plot"],
        "stores": ["probe", "rewrite"],
        "study": ["ablate", "lag"],
        "train": ["shapes"],
    },
)
