"""Rectified flow, noise, ODE solvers and noise levels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "flow": ["Flow"],
        "noise": ["draw", "jitter"],
        "noise_level": ["Estimator", "calibrate", "effective_t", "shifted"],
        "sampling": ["Solver", "sample"],
    },
)
