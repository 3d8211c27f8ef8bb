"""Sampling: solving dx/dt = v from noise to data, with classifier-free guidance.

Shapes: B batch, C channels, R rows (tokens of all captions, packed), U captions, L layers, H text
width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...schemas import NULL, InputError
from .ddpm import Ddpm
from .flow import Flow
from .noise import starting_noise


class Model(Protocol):
    """The part of a network that sampling uses; see :class:`semroute.trainer.model.dit.DiT`."""

    @property
    def latent_shape(self) -> tuple[int, int, int]: ...

    @property
    def router(self) -> Any: ...

    def encode_text(
        self,
        hidden: Tensor,
        offsets: Tensor,
        caption: Tensor,
        t: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
    ) -> Any: ...

    def denoise(self, x_t: Tensor, t: Tensor, text: Any) -> Tensor: ...


Conditioning = Callable[[Tensor], Any]
"""t [B] -> the text that the model's ``denoise`` reads at that t."""

NoiseLevelMap = Callable[[Tensor, Tensor], Tensor]
"""x_t [B, C, h, w] and nominal t [B] -> the t that routing sees, [B]; see :mod:`.noise_level`."""

SamplingDtype = Literal["float32", "bfloat16"]
"""Precisions of matrix products in sampling."""

Callback = Callable[[int, float, Tensor], Tensor | None]
"""Called after each step with the number of steps done, t and x_t [B, C, h, w]; returns None, or
the latents to go on with."""


@dataclass(frozen=True)
class SamplingConfig:
    """Options of the integration from noise to data.

    Attributes:
        num_steps: steps of the schedule.
        cfg_scale: guidance mixes velocities, ``null + cfg_scale (text - null)`` (Ho & Salimans
            2022); at 1 the null text is not computed at all.
        cfg_interval: lowest and highest t with guidance. Outside it, steps have neither guidance
            nor its cost (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        method: ``euler``, one evaluation per step; or ``heun``, two, of second order (Karras et al.
            2022, arXiv 2206.00364, algorithm 1), except for the last step, which is Euler's.
        dtype: of matrix products, by autocast; latents, the residual stream and routing are in
            float32 in any case.
        clock: the t that routing sees in place of the nominal t, which network and solver keep.
            None: the nominal t. Without effect where routing does not depend on t.
    """

    num_steps: int = 50
    cfg_scale: float = 6.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    method: Literal["euler", "heun"] = "euler"
    clock: NoiseLevelMap | None = None
    dtype: SamplingDtype = "float32"

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        if not low < high:
            raise InputError(
                f"the interval of guidance is from t {low:g} to {high:g}; expected the lower first"
            )


def conditioning(
    model: Model,
    hidden: Tensor,
    offsets: Tensor,
    caption: Tensor,
    given: Mapping[str, Tensor] | None = None,
) -> Conditioning:
    """The text of a batch for any t: computed once, unless the routing depends on t.

    Args:
        hidden, offsets, caption: as for :meth:`semroute.trainer.model.dit.DiT.encode_text`.
        given: what a pretrained network's pipeline gives it, by name, [U, ...].
    """
    if model.router.depends_on_t:
        return lambda t: model.encode_text(hidden, offsets, caption, t, given)
    text = model.encode_text(hidden, offsets, caption, None, given)
    return lambda t: text


def solve(
    model: Model,
    flow: Flow | Ddpm,
    text: Conditioning,
    null: Conditioning | None,
    noise: Tensor,
    config: SamplingConfig,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate along the flow's schedule, from t = 1 to t = 0.

    Args:
        text, null: the text of the captions and of the null caption at any t; null may be None at
            a scale of 1.
        noise: [B, C, h, w], x at t = 1.

    Returns:
        latents [B, C, h, w].

    Raises:
        ValueError: guidance without the null text.
    """
    if config.cfg_scale != 1.0 and null is None:
        raise ValueError(
            f"cfg_scale is {config.cfg_scale} but there is no null text to guide away from: pass "
            "the null caption's features, or cfg_scale=1"
        )
    low, high = config.cfg_interval

    def velocity(x: Tensor, now: float) -> Tensor:
        t = torch.full((len(x),), now, dtype=torch.float32, device=x.device)
        t_routing = t if config.clock is None else config.clock(x, t)
        v = flow.to_velocity(model.denoise(x, t, text(t_routing)), x, t)
        if null is None or config.cfg_scale == 1.0 or not low <= now <= high:
            return v
        v_null = flow.to_velocity(model.denoise(x, t, null(t_routing)), x, t)
        return v_null + config.cfg_scale * (v - v_null)

    if config.method == "heun" and isinstance(flow, Ddpm):
        raise InputError("method heun is for rectified flow, and this network is a DDPM: use euler")
    schedule = flow.at(noise.shape).schedule(config.num_steps).tolist()
    x = noise
    for step, (now, after) in enumerate(pairwise(schedule), start=1):
        v = velocity(x, now)
        if config.method == "heun" and step < config.num_steps:
            v = (v + velocity(flow.advance(x, v, now, after), after)) / 2
        x = flow.advance(x, v, now, after)
        if callback is not None:
            changed = callback(step, after, x)
            x = x if changed is None else changed
    return x


@torch.no_grad()
def sample(
    model: Model,
    flow: Flow | Ddpm,
    hidden: Tensor,
    offsets: Tensor,
    null_hidden: Tensor | None = None,
    config: SamplingConfig = SamplingConfig(),
    *,
    given: Mapping[str, Tensor] | None = None,
    null_given: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    shape: tuple[int, int, int] | None = None,
    callback: Callback | None = None,
    null_offsets: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """One latent per caption.

    Args:
        model: a network on the device of ``hidden``.
        hidden: [R, len(router.layers_read), H] packed rows of U captions, any float dtype.
        offsets: int64 [U + 1].
        null_hidden: [R0, len(router.layers_read), H], rows of the null caption; not needed at
            cfg_scale 1.
        given, null_given: what the pipeline of a pretrained network gives it, by name: [U, ...] of
            the captions, [1, ...] of the null caption. Or ``null``, which of these are the null
            caption, bool; by default none of ``hidden``.
        seed, numbers: the noise of latent i is a function of (seed, numbers[i]), by default of
            (seed, i). To sample a list in batches, pass the numbers of each batch.
        shape: (C, h, w) of the latents, by default ``model.latent_shape``.
        null_offsets: int64 [U + 1], if each latent is guided away from a text of its own, whose
            rows ``null_hidden`` then holds.
        noise: [U, C, h, w], to start from instead of that noise.

    Returns:
        fp32 [U, C, h, w] on the device of ``hidden``, in the units that the model was trained on.
    """
    num, device = len(offsets) - 1, hidden.device
    numbers = range(num) if numbers is None else numbers
    shape = model.latent_shape if shape is None else shape
    if noise is None:
        noise = starting_noise(shape, seed=seed, numbers=numbers)
    noise = noise.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        text = conditioning(model, hidden, offsets, torch.arange(num, device=offsets.device), given)
        null = None
        if null_hidden is not None and config.cfg_scale != 1.0:
            ends, none = torch.tensor([0, len(null_hidden)]), torch.zeros(num, dtype=torch.int64)
            if model.router.needs_positions and null_offsets is None:
                null_given = {NULL: torch.ones(1, dtype=torch.bool)}
            if null_offsets is not None:
                ends, none = null_offsets, torch.arange(num)
            null = conditioning(model, null_hidden, ends, none, null_given)
        return solve(model, flow, text, null, noise, config, callback)
