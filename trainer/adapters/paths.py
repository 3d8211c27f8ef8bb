"""Paths between data and noise that pretrained networks were trained on, from their schedulers."""

import math
from collections.abc import Mapping
from typing import Any

from ...schemas import FlowConfig, InputError, PretrainedIdentity
from ..diffusion.ddpm import Ddpm
from ..diffusion.flow import Flow
from .families import FAMILIES

FLUX2_STEPS = 50
"""Sampling steps for which FLUX.2's empirical shift is taken in training."""

IDEOGRAM4_SIDE = 512 / 16
"""Latent pixels at the side of the image that Ideogram 4 does not shift."""


def make_path(config: FlowConfig, pretrained: PretrainedIdentity | None) -> Flow | Ddpm:
    """The path of a run.

    Raises:
        InputError: a density of t or a shift by shape for a DDPM, which has neither.
    """
    if pretrained is None or _family(pretrained).path == "flow":
        return Flow.from_config(config)
    if config.t_density != "logit-normal" or config.shift_area is not None:
        raise InputError(
            f"flow.t_density is {config.t_density} and flow.shift_area {config.shift_area}, but "
            "the pretrained network is a DDPM, whose t is uniform and has no shift: leave them out"
        )
    gamma = config.min_snr_gamma if config.loss_weight == "min-snr" else None
    return Ddpm.from_scheduler(pretrained.scheduler, gamma)


def shift_of(pretrained: PretrainedIdentity, shape: tuple[int, int, int]) -> float | None:
    """The shift of t that the pipeline's scheduler applies to latents of a shape (C, h, w).

    Returns:
        None for a DDPM, which has none.

    Raises:
        InputError: the scheduler does not say.
    """
    family, scheduler = _family(pretrained), pretrained.scheduler
    if family.path == "ddpm":
        return None
    if not scheduler:
        raise InputError(
            "the pretrained model has no scheduler/scheduler_config.json, which says how t is "
            "shifted: set flow.shift"
        )
    if family.name == "ideogram4":  # its pipeline sets the noise levels itself
        return math.sqrt(shape[1] * shape[2]) / IDEOGRAM4_SIDE
    if not scheduler.get("use_dynamic_shifting"):
        # UniPC and DPM-Solver call it flow_shift.
        return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
    return math.exp(_mu(pretrained, scheduler, shape))


def _mu(
    pretrained: PretrainedIdentity, scheduler: Mapping[str, Any], shape: tuple[int, int, int]
) -> float:
    """Logarithm of the shift, which grows with the size of the image, as the pipelines compute
    it."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    family = _family(pretrained)
    num_tokens = family.image_tokens(pretrained.config, *shape)
    if family.name == "flux2":
        return float(compute_empirical_mu(num_tokens, FLUX2_STEPS))
    longest = 6400 if family.name == "krea2" else 4096
    return float(
        calculate_shift(
            num_tokens,
            scheduler.get("base_image_seq_len", 256),
            scheduler.get("max_image_seq_len", longest),
            scheduler.get("base_shift", 0.5),
            scheduler.get("max_shift", 1.15),
        )
    )


def _family(pretrained: PretrainedIdentity) -> Any:
    return next(family for family in FAMILIES if family.name == pretrained.family)
