"""Options that several commands share."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ...schemas import InputError

F = TypeVar("F", bound=Callable[..., Any])

_SAMPLING = (
    click.option(
        "--num-steps",
        default=50,
        show_default=True,
        type=click.IntRange(1),
        help="Of the solver.",
    ),
    click.option(
        "--solver",
        "method",
        default="euler",
        show_default=True,
        type=click.Choice(["euler", "heun"]),
        help="heun: of second order, for two evaluations a step.",
    ),
    click.option(
        "--cfg-interval",
        nargs=2,
        default=(0.0, 1.0),
        show_default=True,
        type=click.FloatRange(0, 1),
        help="Lowest and highest t that are guided.",
    ),
    click.option("--seed", default=0, show_default=True, help="Of the noise."),
    click.option(
        "--batch-size",
        default=64,
        show_default=True,
        type=click.IntRange(1),
        help="Images sampled at once.",
    ),
    click.option(
        "--weights",
        default="ema",
        show_default=True,
        type=click.Choice(["ema", "model"]),
        help="The moving average, or the weights themselves.",
    ),
    click.option("--step", type=click.IntRange(0), help="Which checkpoint. Default: the newest."),
)

clock_option = click.option(
    "--clock",
    default="nominal",
    show_default=True,
    help="The t that routing by t is told: nominal, shift:K, or estimated, from x_t itself.",
)


def sampling_options(command: F) -> F:
    """Of every command that samples from a run."""
    return functools.reduce(lambda found, option: option(found), _SAMPLING[::-1], command)


def take_solver(run: Any, how: dict[str, Any]) -> Any:
    """Take what makes a solver out of the options of a command.

    Args:
        run: :class:`semroute.trainer.runs.run.Run`, whose clock is meant.

    Returns:
        A :class:`semroute.trainer.diffusion.sampling.SamplingConfig`.
    """
    from ..diffusion.sampling import SamplingConfig

    clock = run.clock(how.pop("clock"))
    names = ("num_steps", "cfg_scale", "cfg_interval", "method")
    return SamplingConfig(**{name: how.pop(name) for name in names if name in how}, clock=clock)


def refuse_options(names: Any, why: str) -> None:
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and was_given(parameter.name):
            raise InputError(f"{parameter.opts[0]} {why}")


def was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)


def open_vae_decoder(run: Any, vae: str | None = None) -> Callable[[Any], Any]:
    """Latents of a run -> images uint8 ``[n, H, W, 3]``."""
    from ...pipeline.models.vae import open_decoder

    device = str(next(run.model.parameters()).device)
    return open_decoder(run.record.latents, vae or run.record.vae_source, device)
