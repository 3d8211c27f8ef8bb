"""Rectified flow, noise, ODE solvers and noise levels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "flow": ["Flow"],
        "noise": ["Draws", "NoiseSource", "jitter", "starting_noise"],
        "noise_level": ["NoiseLevelEstimator", "calibrate", "shifted"],
        "sampling": ["SamplingConfig", "sample"],
    },
)
