"""The commands that make stores and look at them: parse, call, print. Imports stay inside.

The first half holds what all commands share, those of the trainer too.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from ..schemas import DEFAULT_RANK, MAX_QUALITY, MAX_SEED, MIN_QUALITY, CodecName, InputError, parse
from ..schemas.units import parse_bytes
from .executor.base import Interrupted

if TYPE_CHECKING:
    from .inspection.pipelines import PipelineText

F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; ``--help`` lists them in this order."""
    return lambda command: functools.reduce(lambda f, add: add(f), reversed(decorators), command)


@contextmanager
def interruptible(
    interrupt: type[BaseException] = Interrupted, message: str | None = None
) -> Iterator[None]:
    """Exit with code 130 when a command that can be resumed is stopped. Also a decorator.

    Args:
        interrupt: what stops it.
        message: printed to standard error.
    """
    try:
        yield
    except interrupt:
        if message is not None:
            report_line(message)
        sys.exit(130)


def report_line(line: str) -> None:
    """Print to standard error: standard output is for results."""
    click.echo(line, err=True)


def print_result(result: Any, as_json: bool) -> None:
    """Print what a command found, as text or as JSON."""
    click.echo(result.to_json() if as_json else result)


def json_option(help: str = "Print JSON.") -> Callable[[F], F]:
    return click.option("--json", "as_json", is_flag=True, help=help)


def is_json(options: dict[str, Any]) -> bool:
    """Whether ``--json-progress`` was given: then standard output holds nothing but JSON."""
    return bool(options["progress"] == "json")


class _ByteSize(click.ParamType):
    """A number of bytes: ``256MB``, ``1GiB``."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class _FiniteFloat(click.types.FloatParamType):
    """A real number; click's own type also takes nan and infinities."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class FiniteRange(click.FloatRange, _FiniteFloat):
    """A real number within bounds, which nan would pass."""


class _Seed(click.types.IntParamType):
    """A seed, within the bounds of those in configurations."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        seed = super().convert(value, param, ctx)
        if not 0 <= seed <= MAX_SEED:
            self.fail(f"{value!r} is not in the range from 0 to {MAX_SEED} (2^63 - 1).", param, ctx)
        return seed


class _Rank(click.ParamType):
    """A whole number, or ``full``."""

    name = "rank"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "full" or isinstance(value, int):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is not a rank: expected 0, 1, 2, ... or full.", param, ctx)
        return click.INT.convert(value, param, ctx)


FINITE_FLOAT = _FiniteFloat()
RANK = _Rank()
SEED = _Seed()
BYTE_SIZE = _ByteSize()
CODECS = click.Choice(get_args(CodecName))
quality_option = click.option(
    "--quality",
    type=FiniteRange(MIN_QUALITY, MAX_QUALITY),
    help="For delta, linear and predictive. Default: 4, an error of 1.1e-2 in LN(h). One step more "
    "halves the error and costs one bit per value.",
)
rank_option = click.option(
    "--rank",
    type=RANK,
    help="With codec predictive: how much of the layer below predicts a layer, from 0 (delta) to "
    f"full (linear). Default: {DEFAULT_RANK}, which a CPU core decodes at 0.4 GB/s or more.",
)
layers_option = click.option(
    "--layers",
    default="all",
    show_default=True,
    help="all; every:3, counted from the last layer; or a list, such as 1-10,17. 0 is the "
    "embedding, which is among all where the preset's pipeline reads it.",
)
exact_option = click.option(
    "--exact-layers",
    help="Layers that are stored exactly too, beside a codec with loss: base, none, or numbers. "
    "base: those that the preset's pipeline reads, the default where it reads some; else none.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(1), help="Use only this many rows, from the start."
)
MODEL_HELP = (
    "The LLM: a Hub id (org/name[@revision]), a folder or a GGUF file; or the text encoder of a "
    "diffusers pipeline, such as org/name/text_encoder."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads per worker, for a new store. Default: all cores, shared among the workers.",
)
plan_options = options(
    click.option("--text-column", help="Column of captions. Default: text, prompt or caption."),
    click.option(
        "--template",
        default="bos",
        show_default=True,
        help="Preset (bos, eos, describe, paper, qwen-image, lumina2, z-image, flux2, "
        "flux2-klein, pixart, sana, wan, krea2, hidream, sd3, auraflow, ideogram4, ltx2, cosmos, "
        "fibo, qwen-image-2.1) or a file that contains {caption}. From qwen-image on: all that the "
        "pipeline of diffusers with this name does to a prompt.",
    ),
    click.option(
        "--keep-prefix/--drop-prefix",
        default=None,
        help="Store the rows of the template's prefix, or do not. Default: as the preset's "
        "pipeline reads them; for others they are dropped.",
    ),
    layers_option,
    click.option(
        "--final-norm",
        type=click.Choice(["normed", "raw", "both"]),
        help="Take the last of L layers after the final norm, as layer L; before it, as layer "
        "L + 1; or both. Default: as the preset's pipeline reads it, or normed.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Longest caption in tokens, including the template. Longer captions are cut, counted "
        "and listed. Default: that of the preset's pipeline, or 512.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Precision of the LLM. auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=SEED,
        help="Seed of the order in which captions are stored.",
    ),
)
"""Options of every command that plans an extraction."""
work_options = options(
    click.option(
        "--shard-size",
        "shard_bytes",
        type=BYTE_SIZE,
        default="256MB",
        show_default=True,
        help="Size of a shard, the unit of work and of writing.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Worker processes. Default: one per GPU, or one per CPU core, up to 4. 0: run in "
        "this process, without Dask.",
    ),
    click.option(
        "--cluster",
        default="local",
        show_default=True,
        help="Where to run: local; a Dask scheduler, by address (tcp://...) or file (.json); or "
        "jobs of a batch system (.yaml).",
    ),
    click.option("--force", is_flag=True, help="Start even if the disk has too little free space."),
    click.option(
        "--json-progress",
        "progress",
        flag_value="json",
        default="auto",
        help="Report progress as JSON, one object per line on standard output; all text goes to "
        "standard error.",
    ),
)
"""Options of every command that fills a store."""


@click.command()
@click.argument("captions")
@click.argument("features")
@click.option("--model", required=True, help=MODEL_HELP)
@plan_options
@click.option(
    "--codec",
    default="delta",
    show_default=True,
    type=CODECS,
    help="How to store hidden states: from exact and fast to read, to a sixth of the bytes.",
)
@quality_option
@rank_option
@exact_option
@click.option(
    "--batch-tokens",
    type=click.IntRange(1),
    help="Tokens per batch, including padding. Default: 512 on a CPU, 16384 on a GPU.",
)
@click.option(
    "--batching",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "padded", "packed"]),
    help="padded: one caption per row of a batch. packed: several, one after the other. auto: "
    "packed if a trial shows that the LLM keeps them apart.",
)
@threads_option
@limit_option
@work_options
@interruptible()
def extract(captions: str, features: str, **options: Any) -> None:
    """Run an LLM over CAPTIONS once and store the hidden states of its layers in FEATURES.

    CAPTIONS is a parquet, jsonl, csv, tsv or txt file or URL, or webdataset tars, such as
    x-{000..031}.tar. Rerun the same command to resume; a store made with other settings is refused.

    \b
    Example:
      semroute extract captions.parquet features --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from .extraction.features import extract as run

    click.echo(run(captions, features, report=report_line, **options), err=is_json(options))


@click.command()
@click.argument("captions")
@click.option("--model", help=f"{MODEL_HELP} Default, with --for: that of the pipeline.")
@click.option(
    "--for",
    "pipeline",
    help="A diffusers pipeline, by its folder or Hub id: what its network reads of captions, and "
    "the bytes per caption of stores for it. Its template is used, and no weights are needed.",
)
@plan_options
@limit_option
@click.option("--codec", type=CODECS, help="Only this codec. Default: all, side by side.")
@quality_option
@rank_option
@exact_option
@click.option(
    "--samples-per-second",
    default=100.0,
    show_default=True,
    type=FiniteRange(0, min_open=True),
    help="Training speed, over all devices.",
)
@click.option(
    "--passes",
    default=10.0,
    show_default=True,
    type=FiniteRange(0, min_open=True),
    help="Passes over the samples, in all epochs, seeds and ablations together.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Run the LLM for 20 seconds to measure sizes, errors and hours, and to tell whether "
    "caching pays.",
)
@json_option()
def estimate(
    captions: str, pipeline: str | None, probe: bool, as_json: bool, **options: Any
) -> None:
    """Estimate what caching CAPTIONS would cost and save. Nothing is written.

    Reports tokens, bytes by codec and layers, the speed that training needs from storage, hours of
    extraction on this machine, and the break-even against running the LLM during training.

    \b
    Examples:
      semroute estimate captions.parquet --model HuggingFaceTB/SmolLM2-135M-Instruct --probe
      semroute estimate captions.parquet --for Efficient-Large-Model/Sana_600M_512px_diffusers
    """
    from .extraction.plan import default_batch_tokens, make_plan
    from .extraction.requests import CaptionsRequest
    from .inspection.benchmark import run_benchmark
    from .inspection.estimate import estimate as run

    names = ("codec", "quality", "rank", "exact_layers", "samples_per_second", "passes")
    workload = {name: options.pop(name) for name in names}
    if pipeline is not None:
        workload["pipeline"] = _choose_pipeline(pipeline, probe, options)
    elif options["model"] is None:
        raise click.MissingParameter(param_hint="--model", param_type="option")
    request = parse(CaptionsRequest, {"source": captions, **options}, "the plan")
    plan = make_plan(request, weights=pipeline is None)
    plan.report_warnings(report_line)
    benchmark = run_benchmark(plan, default_batch_tokens()) if probe else None
    print_result(run(plan, probe=benchmark, **workload), as_json)


def _choose_pipeline(name: str, probe: bool, options: dict[str, Any]) -> "PipelineText":
    """The pipeline of ``--for``; ``options`` get its template and its LLM.

    Raises:
        InputError: no such pipeline, or an option that contradicts it.
    """
    from .inspection.pipelines import read_pipeline

    context = click.get_current_context()
    if context.get_parameter_source("template") is not click.core.ParameterSource.DEFAULT:
        raise InputError("--template is that of the pipeline: leave it out with --for")
    if probe:
        raise InputError(
            "--probe runs the LLM: name it with --model and --template instead of --for"
        )
    pipeline = read_pipeline(name)
    options["template"] = pipeline.preset_name
    options["model"] = options["model"] or pipeline.model
    return pipeline


@click.command()
@click.argument("samples")
@click.argument("latents")
@click.option(
    "--vae",
    default="pixels",
    show_default=True,
    help="pixels: the image itself, in [-1, 1]. Or a diffusers VAE: a Hub id or a folder.",
)
@click.option("--image-column", help="Column of images. Default: image.")
@click.option("--text-column", help="Column of captions, by which latents and features are joined.")
@click.option("--size", type=click.IntRange(1), help="Resize and crop to this height and width.")
@click.option(
    "--buckets",
    type=click.IntRange(1),
    metavar="STEP",
    help="With --size: resize and crop to the nearest of many shapes of about that area, whose "
    "sides are multiples of STEP.",
)
@click.option(
    "--drop-broken",
    is_flag=True,
    help="Complete LATENTS without the images that cannot be read; training skips them.",
)
@limit_option
@work_options
@interruptible()
def latents(samples: str, latents: str, **options: Any) -> None:
    """Encode the images of SAMPLES into LATENTS.

    SAMPLES is the file that the features were made from, with a column of images: paths, bytes, or
    both as HF datasets writes them. Images that cannot be read are listed; the command encodes all
    others, then fails. Rerun the same command to resume.

    \b
    Examples:
      semroute latents shapes/train.parquet latents --vae pixels
      semroute latents photos.parquet latents --vae black-forest-labs/FLUX.1-schnell --size 512
    """
    from .extraction.latents import encode_images

    click.echo(encode_images(samples, latents, report=report_line, **options), err=is_json(options))


@click.command()
@click.argument("captions")
@click.argument("conditioning")
@click.option(
    "--pipeline",
    required=True,
    help="A diffusers pipeline: a folder or a Hub id (org/name[@revision]). Only its tokenizers "
    "and text encoders are loaded.",
)
@click.option("--text-column", help="Column of captions. Default: text, prompt or caption.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Precision of the text encoders. auto: bfloat16 on a GPU, float32 on a CPU.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=SEED,
    help="Seed of the order in which captions are stored: that of the features.",
)
@threads_option
@limit_option
@work_options
@interruptible()
def conditioning(captions: str, conditioning: str, **options: Any) -> None:
    """Store in CONDITIONING what a diffusers pipeline gives its transformer for CAPTIONS, exactly.

    For pipelines whose transformer reads padding rows, pooled vectors or a second text encoder,
    which features do not hold: SD3, FLUX.2, HiDream. CAPTIONS is the file that the features were
    made from; captions have the same numbers in both stores. Rerun the same command to resume.

    \b
    Example:
      semroute conditioning captions.parquet conditioning --pipeline black-forest-labs/FLUX.2-dev
    """
    from .extraction.conditioning import encode_captions

    store = encode_captions(captions, conditioning, report=report_line, **options)
    click.echo(store, err=is_json(options))


@click.command()
@click.argument("store")
@json_option("Print JSON, including the manifest.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a page with figures (norms, massive activations, similarity and error by "
    "layer, lengths) and a search over captions.",
)
def inspect(store: str, as_json: bool, html: Path | None) -> None:
    """Show what a STORE holds, finished or not.

    \b
    Examples:
      semroute inspect features --json
      semroute inspect features --html features.html
    """
    from .inspection.describe import inspect as run

    print_result(run(store), as_json)
    if html is not None:
        from .inspection.report import write_report

        click.echo(write_report(store, html), err=as_json)


@click.command()
@click.argument("store")
@json_option()
def status(store: str, as_json: bool) -> None:
    """Show the progress of a STORE being written: how far, by whom, how fast, and what failed.

    \b
    Example:
      semroute status features
    """
    from .inspection.status import status as run

    print_result(run(store), as_json)


@click.command()
@click.argument("store")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Make a new REPO public. Default: private.")
@click.option(
    "--license",
    help="License of the data, by its name on the Hub, such as cc-by-4.0. Default: none stated.",
)
@click.option("--dry-run", is_flag=True, help="Print the files and the card, and upload nothing.")
def push(store: str, repo: str, **options: Any) -> None:
    """Upload a finished STORE to the Hugging Face Hub as the dataset REPO (name/repository).

    A dataset card says what the store holds and how to read it. Log in first with `hf auth login`.
    Rerun the same command to resume.

    \b
    Example:
      semroute push features my-name/captions-smollm2 --license cc-by-4.0 --dry-run
    """
    from .inspection.hub import push as run

    click.echo(run(store, repo, report=report_line, **options))


@click.command()
@click.argument("store")
@click.option("--repair", is_flag=True, help="Mark bad shards as not written.")
@click.option(
    "--against",
    metavar="PIPELINE",
    help="Compare rows with those of a diffusers pipeline instead: a folder or a Hub id "
    "(org/name[@revision]), of which tokenizers and text encoders are loaded.",
)
@click.option(
    "--num",
    type=click.IntRange(1),
    help="With --against: captions to compare, besides the null caption. Default: 8.",
)
@json_option()
def verify(store: str, repair: bool, against: str | None, num: int | None, as_json: bool) -> None:
    """Read all of STORE and check it against what was written.

    Checks every checksum, row range, receipt and manifest key. The exit code is 1 if anything is
    wrong. After --repair, rerun the command that made the store: it rewrites only the bad shards.

    With --against, the pipeline encodes some captions itself, and what it would give its
    transformer is compared with the stored rows. If all agree, this is recorded in STORE.

    \b
    Examples:
      semroute verify features --repair
      semroute verify features --against Efficient-Large-Model/Sana_600M_512px_diffusers
    """
    if against is not None:
        if repair:
            raise InputError("--repair does not go with --against, which reads a few rows only")
        sys.exit(_compare(store, against, num or 8, as_json))
    if num is not None:
        raise InputError("--num needs --against")
    from .store.verify import repair as mark_bad
    from .store.verify import verify as run

    findings = run(store, progress=not as_json)
    print_result(findings, as_json)
    if repair and (marked := mark_bad(findings)):
        report_line(
            f"{len(marked)} shards are marked as not written; rerun the command that made them"
        )
    if findings.problems:
        sys.exit(1)


def _compare(store: str, pipeline: str, num: int, as_json: bool) -> int:
    """Compare a store with a pipeline; returns the exit code."""
    from .executor.workers import own_device
    from .inspection.against import compare_with_pipeline

    comparison = compare_with_pipeline(store, pipeline, num, own_device())
    print_result(comparison, as_json)
    return int(bool(comparison.problems))
