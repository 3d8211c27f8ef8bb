"""``semroute shapes`` and ``semroute train``."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...pipeline.commands.options import LOCAL_PATH, SEED, FiniteRange, echo, interruptible, suggest
from ...schemas import InputError, TrainConfig, read_config
from ...schemas.files import is_local, locate
from .options import refuse_options

if TYPE_CHECKING:
    from ..training.setup import Opening


@click.command()
@click.argument("out", type=LOCAL_PATH)
@click.option(
    "--num", default=20_000, show_default=True, type=click.IntRange(1), help="Training images."
)
@click.option(
    "--num-test", default=600, show_default=True, type=click.IntRange(2), help="Test captions."
)
@click.option(
    "--num-dev",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Captions to choose settings by.",
)
@click.option(
    "--images-per-caption",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Images per training caption, each rendered anew.",
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Seed of the whole world.")
@click.option(
    "--split-by",
    "by",
    default="scene",
    show_default=True,
    type=click.Choice(["scene", "caption"]),
    help="What no two files share. caption: scenes of training come back in other words, as in "
    "the first release.",
)
def shapes(out: Path, num: int, seed: int, **sizes: Any) -> None:
    """Render a world of captioned coloured shapes into OUT.

    OUT/train.parquet is for training. OUT/test.parquet holds scenes that do not occur there, half
    of them with combinations of colour and shape that do not either. OUT/dev.parquet holds further
    scenes, to choose settings by.

    \b
    Example:
      semroute shapes shapes --num 20000 --seed 0
    """
    from ..shapes.dataset import write_world

    echo(write_world(out, num, seed, **sizes))
    suggest("extract", out / "train.parquet", "FEATURES", "--model", "LLM")


@click.command()
@click.argument("config", type=LOCAL_PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Report what the run would take, and train nothing.")
@click.option(
    "--ranks", type=click.IntRange(1), help="With --dry-run: number of processes. Default: 1."
)
@click.option(
    "--step-seconds",
    type=FiniteRange(0, min_open=True),
    help="With --dry-run: seconds per step, to report how fast the stores must deliver.",
)
@click.option(
    "--measure",
    type=click.IntRange(1),
    metavar="STEPS",
    help="With --dry-run: run this many steps here to time one, and discard them.",
)
@click.option(
    "--from-checkpoint",
    "resume_from",
    default="newest",
    show_default=True,
    type=click.Choice(["newest", "previous"]),
    help="Checkpoint to resume from. previous: if the newest is damaged, set it aside and resume "
    "from the newest whole one.",
)
@click.option(
    "--unverified",
    is_flag=True,
    help="Train a pretrained network on stores that semroute verify --against has not compared "
    "with its pipeline; as data.unverified=true.",
)
def train(
    config: Path,
    overrides: tuple[str, ...],
    dry_run: bool,
    ranks: int | None,
    step_seconds: float | None,
    measure: int | None,
    resume_from: Any,
    unverified: bool,
) -> None:
    """Train as the YAML file CONFIG says; KEY=VALUE replaces single values.

    The LLM is never loaded. Rerun the same command to resume. On several GPUs:
    accelerate launch -m semroute.cli train CONFIG

    \b
    Examples:
      semroute train run.yaml routing.strategy=time optimizer.router_lr=1e-3
      semroute train run.yaml --dry-run --ranks 64 --step-seconds 0.4
    """
    parsed = read_config(config, [*overrides, *["data.unverified=true"] * unverified])
    if dry_run:
        refuse_options(["resume_from"], "does not go with --dry-run, which resumes nothing")
        if step_seconds is not None and measure is not None:
            raise InputError("give either --step-seconds or --measure")
        from ..training.dry_run import plan

        echo(
            plan(
                parsed, num_ranks=ranks or 1, step_seconds=step_seconds, measure_steps=measure or 0
            )
        )
        return
    if not (ranks is None and step_seconds is None and measure is None):
        raise InputError("--ranks, --step-seconds and --measure need --dry-run")
    with _opening(parsed) as opening:
        from ..runs.threads import chosen_threads
        from ..training.train import train as run
        from ..training.trainer import TrainingInterrupted

    try:
        with interruptible(TrainingInterrupted), chosen_threads(Path(parsed.output)):
            path = run(parsed, resume_from=resume_from, opening=opening)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    echo(f"{path} is trained: semroute plot {path}")


@contextmanager
def _opening(config: TrainConfig) -> "Iterator[Opening | None]":
    """Open the stores of a run in a thread while the block imports torch; both take seconds.

    None where a store is behind a URL: packages that reach it would be imported in two threads.
    """
    data = config.data
    names = [config.features, config.latents, data.conditioning, data.select.columns]
    for more in data.mixture:
        names += [more.features, more.latents, more.conditioning, more.select.columns]
    if not all(is_local(locate(name)) for name in names if name is not None):
        yield None
        return
    # Imports what opening needs, before there are two threads.
    from ...pipeline.store import conditioning, features, latents  # noqa: F401
    from ...pipeline.store.budget import followed  # noqa: F401
    from ...pipeline.store.order.dataset import open_stores

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(open_stores, config)
