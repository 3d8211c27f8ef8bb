"""Options that the commands of the trainer share, and what several of them make of these."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ...pipeline.commands.options import FINITE_FLOAT, SEED, F, FiniteRange, options
from ...schemas import InputError

if TYPE_CHECKING:
    import numpy as np

    from ..diffusion.sampling import SamplingConfig
    from ..runs.run import Run

STOPPED = "Stopped. Rerun the same command to resume."
SOLVERS = click.Choice(["euler", "heun"])

step_option = click.option(
    "--step", type=click.IntRange(0), help="Checkpoint to load. Default: the newest."
)
weights_option = click.option(
    "--weights",
    default="ema",
    show_default=True,
    type=click.Choice(["ema", "model"]),
    help="ema: the moving average of the weights. model: the weights themselves.",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=SEED, help="Seed of the noise."
)
batch_size_option = click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Images sampled at once.",
)
clock_option = click.option(
    "--clock",
    default="nominal",
    show_default=True,
    help="Noise level for routing by t: nominal; shift:K; or estimated, from x_t itself.",
)


dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Precision of matrix products. auto: bfloat16 on a GPU, for runs that were trained so.",
)


def num_steps_option(least: int = 1, help: str = "Steps of the solver.") -> Callable[[F], F]:
    return click.option(
        "--num-steps", default=50, show_default=True, type=click.IntRange(least), help=help
    )


def cfg_scales_option(*default: float) -> Callable[[F], F]:
    return click.option(
        "--cfg-scale",
        "cfg_scales",
        multiple=True,
        default=default,
        show_default=True,
        type=FINITE_FLOAT,
        help="Guidance scale; may be given several times.",
    )


sampling_options = options(
    num_steps_option(),
    click.option(
        "--solver",
        "method",
        default="euler",
        show_default=True,
        type=SOLVERS,
        help="heun is of second order, for two evaluations per step.",
    ),
    click.option(
        "--cfg-interval",
        nargs=2,
        default=(0.0, 1.0),
        show_default=True,
        type=FiniteRange(0, 1),
        help="Lowest and highest t with guidance.",
    ),
    seed_option,
    batch_size_option,
    weights_option,
    step_option,
    clock_option,
    dtype_option,
)
"""Options of every command that samples from a checkpoint of a run."""


def scoring_options(*, required: bool) -> Callable[[F], F]:
    """The captions that runs are scored on, and what their images should show."""
    return options(
        click.option(
            "--features",
            required=required,
            help="Feature store of the captions to score on.",
        ),
        click.option(
            "--samples",
            required=required,
            help="The test.parquet of the shapes that the features were extracted from.",
        ),
    )


def pop_sampling_config(run: Run, options: dict[str, Any]) -> SamplingConfig:
    """Make a solver of the options that configure one, which are removed from ``options``.

    Args:
        run: its clock is used.
    """
    from ..diffusion.sampling import SamplingConfig

    refuse_unguided_interval([options["cfg_scale"]])
    clock = run.clock(options.pop("clock"))
    names = ("num_steps", "cfg_scale", "cfg_interval", "method")
    config = {name: options.pop(name) for name in names if name in options}
    return SamplingConfig(**config, clock=clock, dtype=run.sampling_dtype(options.pop("dtype")))


def was_given(name: str) -> bool:
    """Whether the user named a parameter of the current command."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)


def refuse_options(names: Collection[str], why: str) -> None:
    """Refuse parameters of the current command that the user named.

    Raises:
        InputError: ``--option``, followed by ``why``.
    """
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and was_given(parameter.name):
            raise InputError(f"{parameter.opts[0]} {why}")


def refuse_unguided_interval(cfg_scales: Collection[float]) -> None:
    """Refuse an interval of guidance where there is none.

    Raises:
        InputError: ``--cfg-interval`` is given, and all scales are 1.
    """
    if {*cfg_scales} == {1.0}:
        refuse_options(["cfg_interval"], "has no effect: guidance scale 1 means none. Leave it out")


def open_vae_decoder(run: Run, vae: str | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Latents of a run -> images uint8 ``[n, H, W, 3]``.

    Args:
        vae: where it is now. Default: where it was when the latents were made.
    """
    from ...pipeline.models.vae import open_decoder

    if vae is not None and run.record.latents.vae == "pixels":
        raise InputError(
            f"--vae {vae} is not used: the latents of {run.path} are pixels, which no VAE decodes. "
            "Leave it out."
        )
    device = str(next(run.model.parameters()).device)
    return open_decoder(run.record.latents, vae or run.record.vae_source, device)
