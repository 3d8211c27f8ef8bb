"""The training loop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accelerator": ["make_accelerator"],
        "dry_run": ["plan"],
        "metrics": ["Window"],
        "optimizers": ["make_optimizers", "make_schedule"],
        "ranks": ["RankStopped", "Ranks", "joined"],
        "saver": ["Saver"],
        "setup": ["Setup", "make_loader", "make_record", "prepare"],
        "trainer": ["Trainer", "TrainingInterrupted"],
        "validation": ["Validation", "open_validation"],
    },
)
