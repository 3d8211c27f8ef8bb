"""The commands that make stores and look at them: parse, call, print. Imports stay inside."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..schemas import MAX_QUALITY, MIN_QUALITY, InputError, parse
from ..schemas.units import parse_bytes
from .executor.base import Interrupted

F = TypeVar("F", bound=Callable[..., Any])


def report_line(line: str) -> None:
    click.echo(line, err=True)


def is_json(options: dict[str, Any]) -> bool:
    """Standard output is for machines."""
    return bool(options["progress"] == "json")


def interruptible(command: F) -> F:
    """Ctrl-C, once drained, ends a command with exit code 130."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except Interrupted:
            sys.exit(130)

    return wrapper  # type: ignore[return-value]


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda f, option: option(f), options[::-1], command)


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


CODECS = click.Choice(["bf16", "lossless", "delta", "linear"])
quality_option = click.option(
    "--quality",
    type=click.FloatRange(MIN_QUALITY, MAX_QUALITY),
    help="Of delta and linear. Default 4: error of LN(h) 1.1e-2; one more halves it and costs a "
    "bit a value.",
)


_plan_options = _together(
    click.option(
        "--model",
        required=True,
        help="The LLM: a hub id (org/name[@revision]), a folder or a GGUF file.",
    ),
    click.option("--text-column", help="Column of captions. Default: text, prompt or caption."),
    click.option(
        "--template",
        default="bos",
        show_default=True,
        help="Preset (bos, eos, describe, paper, qwen-image, lumina2, z-image, flux2, "
        "flux2-klein) or a file that holds {caption}.",
    ),
    click.option("--keep-prefix", is_flag=True, help="Store the template's prefix rows too."),
    click.option(
        "--layers",
        default="all",
        show_default=True,
        help="all, every:3 (counted from the last), or 1-10,17.",
    ),
    click.option(
        "--max-length",
        default=512,
        show_default=True,
        type=click.IntRange(1),
        help="Tokens, the template included; longer captions are cut, counted and listed.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="In which the LLM runs. auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
    click.option(
        "--seed", default=0, show_default=True, help="Of the order in which captions are stored."
    ),
)
"""Of every command that plans an extraction."""


_limit_option = click.option("--limit", type=click.IntRange(1), help="Only the first rows.")
work_options = _together(
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
        help="Processes. Default: one a GPU, or one a CPU core up to 4. 0: this process, without "
        "Dask.",
    ),
    click.option(
        "--cluster",
        default="local",
        show_default=True,
        help="Where: local; a Dask scheduler, by address (tcp://...) or file (.json); or jobs of a "
        "batch system (.yaml).",
    ),
    click.option("--force", is_flag=True, help="Begin although the disk has too little space."),
    click.option(
        "--json-progress",
        "progress",
        flag_value="json",
        default="auto",
        help="Progress as JSON, an object a line on standard output, all text on standard error.",
    ),
)
"""Of every command that fills a store."""


@click.command()
@click.argument("captions")
@click.argument("features")
@_plan_options
@click.option(
    "--codec",
    default="delta",
    show_default=True,
    type=CODECS,
    help="How hidden states are stored: from exact and fast to read, to a sixth of the bytes.",
)
@quality_option
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    help="Tokens a batch, padding included. Default: 512 on a CPU, 16384 on a GPU.",
)
@click.option(
    "--batching",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "padded", "packed"]),
    help="Captions of a batch in lines of their own, or packed one after the other; auto: packed "
    "where a trial shows that the LLM keeps them apart.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads a worker, for a new store. Default: all cores over all workers.",
)
@_limit_option
@work_options
@interruptible
def extract(captions: str, features: str, **options: Any) -> None:
    """Run an LLM over CAPTIONS once; store its layers' hidden states in FEATURES.

    CAPTIONS is a parquet, jsonl, csv, tsv or txt file or URL, or webdataset tars, such as
    x-{000..031}.tar. The same command continues what was interrupted, and refuses a store that was
    made otherwise.

    \b
    Example:
      semroute extract captions.parquet features --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from .extraction.features import extract as run

    click.echo(run(captions, features, report=report_line, **options), err=is_json(options))


@click.command()
@click.argument("captions")
@_plan_options
@_limit_option
@click.option("--codec", type=CODECS, help="Default: all, side by side.")
@quality_option
@click.option(
    "--samples-per-second",
    default=100.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Speed of training, over all its devices.",
)
@click.option(
    "--passes",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Times that the samples are trained on, over all epochs, seeds and ablations.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Run the LLM for 20 seconds: measured sizes and errors, hours, and whether caching pays.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def estimate(captions: str, probe: bool, as_json: bool, **options: Any) -> None:
    """Say what caching CAPTIONS would take and save, before anything is written.

    Tokens, bytes by codec and layers, what storage must deliver to train, hours of extraction on
    this machine, and the break-even against running the LLM during training.

    \b
    Example:
      semroute estimate captions.parquet --model HuggingFaceTB/SmolLM2-135M-Instruct --probe
    """
    from .extraction import plan as planning
    from .extraction.requests import CaptionsRequest
    from .inspection import benchmark as probing
    from .inspection import estimate as estimation

    names = ("codec", "quality", "samples_per_second", "passes")
    how = {name: options.pop(name) for name in names}
    request = parse(CaptionsRequest, {"source": captions, **options}, "the plan")
    plan = planning.make_plan(request)
    plan.report_warnings(report_line)
    probed = probing.run_benchmark(plan, planning.default_batch_tokens()) if probe else None
    found = estimation.estimate(plan, probe=probed, **how)
    click.echo(found.to_json() if as_json else found)


@click.command()
@click.argument("samples")
@click.argument("latents")
@click.option(
    "--vae",
    default="pixels",
    show_default=True,
    help="pixels: the image itself, in [-1, 1]. Or a VAE of diffusers: a hub id or a folder.",
)
@click.option("--image-column", help="Column of images. Default: image.")
@click.option("--text-column", help="Column of captions, by which latents and features are joined.")
@click.option("--size", type=click.IntRange(1), help="Resize and crop to this height and width.")
@click.option(
    "--buckets",
    type=click.IntRange(1),
    metavar="STEP",
    help="With --size: to the nearest of many shapes of about that area instead, whose sides are "
    "multiples of STEP.",
)
@click.option(
    "--drop-broken",
    is_flag=True,
    help="Complete LATENTS without images that cannot be read; training leaves them out.",
)
@_limit_option
@work_options
@interruptible
def latents(samples: str, latents: str, **options: Any) -> None:
    """Encode the images of SAMPLES into LATENTS.

    SAMPLES is the same file that the features were made from, with a column of images: paths,
    bytes, or both as HF datasets writes them. Images that cannot be read are listed, and fail the
    command when all others are encoded.

    \b
    Examples:
      semroute latents shapes/train.parquet latents --vae pixels
      semroute latents photos.parquet latents --vae black-forest-labs/FLUX.1-schnell --size 512
    """
    from .extraction.latents import encode_images

    click.echo(encode_images(samples, latents, report=report_line, **options), err=is_json(options))


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="For machines; the manifest included.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with figures: norms, massive activations, similarity and error by layer, "
    "lengths, and a search over captions.",
)
def inspect(store: str, as_json: bool, html: Path | None) -> None:
    """Say what a feature or latent STORE holds, finished or not.

    \b
    Examples:
      semroute inspect features --json
      semroute inspect features --html features.html
    """
    from .inspection.describe import inspect as look

    found = look(store)
    click.echo(found.to_json() if as_json else found)
    if html is not None:
        from .inspection.report import write_report

        click.echo(write_report(store, html), err=as_json)


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def status(store: str, as_json: bool) -> None:
    """Say how far a STORE is that is being written, by whom, how fast, and what failed.

    \b
    Example:
      semroute status features
    """
    from .inspection.status import status as look

    found = look(store)
    click.echo(found.to_json() if as_json else found)


@click.command()
@click.argument("store")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Where REPO is made. Default: private.")
@click.option(
    "--license", help="Of the data, by the Hub's names, such as cc-by-4.0. Default: none is stated."
)
@click.option("--dry-run", is_flag=True, help="Print the files and the card, and send nothing.")
def push(store: str, repo: str, **options: Any) -> None:
    """Upload a finished STORE to the Hugging Face Hub, as the dataset REPO (name/repository).

    With a card that says what it holds and how to read it. Log in first, with `hf auth login`. The
    same command continues what was interrupted.

    \b
    Example:
      semroute push features my-name/captions-smollm2 --license cc-by-4.0 --dry-run
    """
    from .inspection.hub import push as run

    click.echo(run(store, repo, report=report_line, **options))


@click.command()
@click.argument("store")
@click.option("--repair", is_flag=True, help="Mark bad shards as not written.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def verify(store: str, repair: bool, as_json: bool) -> None:
    """Read the whole of STORE and compare it with what was written.

    Every checksum, range of rows, receipt and key of the manifest. Ends with 1 where something is
    wrong. After --repair, the command that made the store writes just the bad shards anew.

    \b
    Example:
      semroute verify features --repair
    """
    from .store import verify as verification

    found = verification.verify(store, progress=not as_json)
    click.echo(found.to_json() if as_json else found)
    if repair and (marked := verification.repair(found)):
        report_line(
            f"{len(marked)} shards are marked as not written: run the command that made them"
        )
    if found.problems:
        sys.exit(1)
