"""The command line: parse, call, print. Heavy imports stay inside the commands."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from . import __version__
from .pipeline.layout import parse_bytes
from .schemas import InputError

F = TypeVar("F", bound=Callable[..., Any])


class _Commands(click.Group):
    """Commands whose bad input ends in one message, not in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="semroute")
def cli() -> None:
    """Cache every LLM layer once, then learn which layer each DiT block should read.

    \b
    captions --extract--> features --train--> run --sample, evaluate, plot
    images   --latents--> latents  ---^
    """


def _report(line: str) -> None:
    click.echo(line, err=True)


def _interruptible(command: F) -> F:
    """Ctrl-C, once drained, ends a command with exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from .pipeline.cluster import Interrupted

        try:
            return command(*args, **kwargs)
        except Interrupted:
            sys.exit(130)

    return wrapper  # type: ignore[return-value]


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


def _work_options(command: F) -> F:
    """Options of every command that fills a store."""
    for option in reversed(
        [
            click.option("--limit", type=click.IntRange(1), help="Only the first rows."),
            click.option(
                "--shard-size",
                "shard_bytes",
                type=_Size(),
                default="256MB",
                show_default=True,
                help="Size of a shard: the unit of work and of writing.",
            ),
            click.option(
                "--workers",
                type=click.IntRange(0),
                help="Processes. Default: one a GPU, or one a CPU core up to 4. 0: this process, "
                "without Dask.",
            ),
            click.option(
                "--force", is_flag=True, help="Begin although the disk has too little space."
            ),
        ]
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--num", default=20_000, show_default=True, type=click.IntRange(1), help="Images to train on."
)
@click.option(
    "--num-test", default=600, show_default=True, type=click.IntRange(2), help="Test captions."
)
@click.option("--images-per-caption", default=4, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def shapes(out: Path, num: int, num_test: int, images_per_caption: int, seed: int) -> None:
    """Draw a world of captioned coloured shapes into OUT.

    OUT/train.parquet is what to train on; OUT/test.parquet holds captions that do not occur in it,
    half of them about combinations of colour and shape that do not either.

    \b
    Example:
      semroute shapes shapes --num 20000 --seed 0
    """
    from .trainer.shapes import write_world

    click.echo(
        write_world(out, num, seed, images_per_caption=images_per_caption, num_test=num_test)
    )


@cli.command()
@click.argument("captions")
@click.argument("features", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    help="The LLM: a hub id (org/name[@revision]), a folder or a GGUF file.",
)
@click.option("--text-column", help="Column of captions. Default: text, prompt or caption.")
@click.option(
    "--template",
    default="bos",
    show_default=True,
    help="Preset (bos, describe, paper) or a file that holds {caption}.",
)
@click.option("--keep-prefix", is_flag=True, help="Store the template's prefix rows too.")
@click.option(
    "--layers",
    default="all",
    show_default=True,
    help="all, every:3 (counted from the last), or 5,11,17.",
)
@click.option(
    "--max-length",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens, the template included; longer captions are cut, counted and listed.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="In which the LLM runs. auto: bfloat16 on a GPU, float32 on a CPU.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Of the order in which captions are stored."
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    help="Tokens a batch, padding included. Default: 512 on a CPU, 16384 on a GPU.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads a worker, for a new store. Default: all cores over all workers.",
)
@_work_options
@_interruptible
def extract(captions: str, features: Path, **options: Any) -> None:
    """Run an LLM over CAPTIONS once; store its layers' hidden states in FEATURES.

    CAPTIONS is a parquet, jsonl, csv, tsv or txt file or URL. The same command continues what was
    interrupted, and refuses a store that was made otherwise.

    \b
    Example:
      semroute extract captions.parquet features --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from .pipeline.extraction import extract as run

    click.echo(run(captions, features, report=_report, **options))


@cli.command()
@click.argument("samples")
@click.argument("latents", type=click.Path(path_type=Path))
@click.option(
    "--vae",
    default="pixels",
    show_default=True,
    type=click.Choice(["pixels"]),
    help="pixels: the image itself, in [-1, 1].",
)
@click.option("--image-column", help="Column of images. Default: image.")
@click.option("--text-column", help="Column of captions, by which latents and features are joined.")
@click.option("--size", type=click.IntRange(1), help="Resize and crop to this height and width.")
@_work_options
@_interruptible
def latents(samples: str, latents: Path, **options: Any) -> None:
    """Encode the images of SAMPLES into LATENTS.

    SAMPLES is the same file that the features were made from, with a column of images: paths,
    bytes, or both as HF datasets writes them.

    \b
    Example:
      semroute latents shapes/train.parquet latents --vae pixels
    """
    from .pipeline.imaging import encode_images

    click.echo(encode_images(samples, latents, report=_report, **options))


@cli.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines; the manifest included.")
def inspect(store: Path, as_json: bool) -> None:
    """Say what a feature or latent STORE holds, finished or not.

    \b
    Example:
      semroute inspect features --json
    """
    from .pipeline.inspection import inspect as look

    found = look(store)
    click.echo(found.to_json() if as_json else found)


if __name__ == "__main__":
    cli()
