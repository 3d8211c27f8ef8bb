"""The training loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dry_run": ["plan"],
        "optimizers": ["make_optimizers"],
        "setup": ["make_record"],
        "trainer": ["TrainingInterrupted"],
    },
)
