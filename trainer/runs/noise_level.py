"""The noise level that a run's routing reads in sampling: its clock."""

from pathlib import Path

import numpy as np
import torch

from ...schemas import InputError
from ..diffusion.noise_level import NoiseLevelEstimator, calibrate, shifted
from ..diffusion.sampling import NoiseLevelMap

CLOCK = "clock.safetensors"
"""File in a run directory with its calibrated estimator."""
NUM_LATENTS = 4000
"""Latents to calibrate an estimator on, at most."""


def make_clock(name: str, run: Path, latents: str) -> NoiseLevelMap | None:
    """The clock of a name: ``nominal``, ``shift:K`` or ``estimated``.

    Args:
        run: the run directory, which holds the estimator once it is calibrated.
        latents: the store that the run was trained on, for the calibration.

    Returns:
        None for ``nominal``.

    Raises:
        InputError: the name is unknown, or the store is needed and missing.
    """
    if name == "nominal":
        return None
    if name == "estimated":
        estimator = open_estimator(run, latents)
        return lambda x, t: estimator.on(x.device)(x)
    kind, _, value = name.partition(":")
    try:
        shift = float(value)
    except ValueError:
        shift = 0.0
    if kind != "shift" or not 0 < shift < float("inf"):
        raise InputError(
            f"found clock {name!r}; expected nominal, estimated, or shift:K with a number K above "
            "0, such as shift:0.7"
        )
    return lambda x, t: shifted(t, shift)


def open_estimator(run: Path, latents: str) -> NoiseLevelEstimator:
    """The estimator of a run directory, ``clock.safetensors``; calibrated and saved if missing.

    It is a function of the store's latents alone, of which it is calibrated on evenly spaced ones
    of the first shape.

    Raises:
        InputError: the store is missing or has too few latents, or the file is no estimator.
    """
    path = run / CLOCK
    if path.exists():
        return NoiseLevelEstimator.load(path)
    from ...pipeline.store.open import open_latents

    store = open_latents(latents)
    ids = store.ids[store.buckets[store.ids] == 0]
    places = np.linspace(0, max(0, len(ids) - 1), min(len(ids), NUM_LATENTS)).astype(np.int64)
    picked = ids[np.unique(places)]
    estimator = calibrate(torch.from_numpy(store.read(picked)))
    estimator.save(path)
    return estimator
