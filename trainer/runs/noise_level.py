"""The noise level that a run's routing is told."""

from pathlib import Path

import numpy as np
import torch

from ...pipeline.store.open import open_latents
from ...schemas import InputError
from ..diffusion.noise_level import NoiseLevelEstimator, calibrate, shifted
from ..diffusion.sampling import NoiseLevelMap

CLOCK = "clock.safetensors"
"""Of a run directory: its calibrated estimator."""
NUM_LATENTS = 4000
"""That an estimator is calibrated on, of a store that has more."""


def make_clock(name: str, run: Path, latents: str) -> NoiseLevelMap | None:
    """The clock that a name stands for: ``nominal``, ``shift:K``, or ``estimated``.

    Args:
        run: the run directory. The estimator is read from it, and calibrated where it is not there.
        latents: the store that the run was trained on, to calibrate it.

    Returns:
        None for ``nominal``.

    Raises:
        InputError: another name, or a store that is needed and not there.
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
            "0, as shift:0.7"
        )
    return lambda x, t: shifted(t, shift)


def open_estimator(run: Path, latents: str) -> NoiseLevelEstimator:
    """The estimator of a run directory, ``clock.safetensors``; made there where it is not yet.

    It is calibrated on latents of the store, evenly picked, as a function of them alone; of several
    shapes, on those of the first.

    Raises:
        InputError: no such store, too few latents, or a file that is no estimator.
    """
    path = run / CLOCK
    if path.exists():
        return NoiseLevelEstimator.load(path)
    store = open_latents(latents)
    ids = store.ids[store.buckets[store.ids] == 0]
    places = np.linspace(0, max(0, len(ids) - 1), min(len(ids), NUM_LATENTS)).astype(np.int64)
    picked = ids[np.unique(places)]
    estimator = calibrate(torch.from_numpy(store.read(picked)))
    estimator.save(path)
    return estimator
