"""The commands that make stores and look at them: parse, call, print. Imports stay inside."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...schemas import InputError, parse
from ..executor.threads import PATIENT, wait_briefly

if TYPE_CHECKING:
    from ..inspection.pipelines import PipelineText

from .options import (
    BYTE_SIZE,
    CODECS,
    LOCAL_FILE,
    LOCAL_PATH,
    MODEL_HELP,
    SEED,
    FiniteRange,
    echo,
    exact_option,
    interruptible,
    is_json,
    json_option,
    limit_option,
    plan_options,
    print_result,
    quality_option,
    rank_option,
    report_line,
    suggest,
    text_options,
    threads_option,
    work_options,
)


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
@click.option("--budget", type=BYTE_SIZE, help="Bytes that FEATURES may take, with --for.")
@click.option(
    "--for",
    "runs",
    multiple=True,
    type=LOCAL_PATH,
    help="YAML file or directory of a run: with --budget, shards are written as it comes to them, "
    "and evicted once all such runs have read them. May be given several times.",
)
@threads_option
@limit_option
@work_options
@interruptible()
def extract(captions: str, features: str, **options: Any) -> None:
    """Run an LLM over CAPTIONS once and store the hidden states of its layers in FEATURES.

    CAPTIONS is a table (parquet, jsonl, json, csv, tsv, txt or arrow), webdataset tars, or a folder
    of tables or of images with captions beside them; by path or URL, several by a pattern such as
    x-{000..031}.tar or with :: between. Rerun the same command to resume; a store made with other
    settings is refused.

    \b
    Examples:
      semroute extract captions.parquet features --model HuggingFaceTB/SmolLM2-135M-Instruct
      semroute extract captions.parquet features --model LLM --budget 500GB --for run.yaml
    """
    wait_briefly(PATIENT)  # an extraction takes hours, in which other work may begin
    from ..extraction.features import extract as run

    echo(run(captions, features, report=report_line, **options), err=is_json(options))
    suggest("inspect", features)


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
@click.option("--budget", type=BYTE_SIZE, help="Also what extract --budget would take and cost.")
@click.option(
    "--probe",
    is_flag=True,
    help="Run the LLM for 20 seconds to measure sizes, errors and hours, and to tell whether "
    "caching pays.",
)
@click.option(
    "--storage",
    metavar="FOLDER",
    help="A folder with large files on the disk that the store will be on: measure for two seconds "
    "per codec what it delivers, and whether it feeds training.",
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
    from ..extraction.plan import default_batch_tokens, make_plan
    from ..extraction.requests import CaptionsRequest
    from ..inspection.benchmark import run_benchmark
    from ..inspection.estimate import estimate as run

    names = (
        *("codec", "quality", "rank", "exact_layers", "samples_per_second", "passes", "budget"),
        "storage",
    )
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
    if not as_json:
        template = ["--template", options["template"]] * (options["template"] != "bos")
        suggest("extract", captions, "FEATURES", "--model", options["model"], *template)


def _choose_pipeline(name: str, probe: bool, options: dict[str, Any]) -> "PipelineText":
    """The pipeline of ``--for``; ``options`` get its template and its LLM.

    Raises:
        InputError: no such pipeline, or an option that contradicts it.
    """
    from ..inspection.pipelines import read_pipeline

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
@click.option(
    "--image-column",
    help="Column of images. Default: image, or the only one of jpg, png, file_name, image_path "
    "and image_binary.",
)
@click.option(
    "--image-folder",
    help="Folder that paths of images are relative to. Default: that of the table.",
)
@text_options
@click.option("--size", type=click.IntRange(1), help="Resize and crop to this height and width.")
@click.option(
    "--buckets",
    type=click.IntRange(1),
    metavar="STEP",
    help="With --size: resize and crop to the nearest of many shapes of about that area, whose "
    "sides are multiples of STEP.",
)
@click.option(
    "--broken",
    default="error",
    show_default=True,
    type=click.Choice(["error", "skip"]),
    help="Images that are missing or cannot be read. skip: complete LATENTS without them; training "
    "skips their samples.",
)
@click.option("--drop-broken", "broken", flag_value="skip", hidden=True)
@limit_option
@work_options
@interruptible()
def latents(samples: str, latents: str, **options: Any) -> None:
    """Encode the images of SAMPLES into LATENTS.

    SAMPLES is what the features were made from, with a column of images (paths, bytes, or both as
    HF datasets writes them) or a folder of them. Images that cannot be read are listed; the command
    encodes all others, then fails. Rerun the same command to resume.

    \b
    Examples:
      semroute latents shapes/train.parquet latents --vae pixels
      semroute latents photos.parquet latents --vae black-forest-labs/FLUX.1-schnell --size 512
    """
    from ..extraction.latents import encode_images

    echo(encode_images(samples, latents, report=report_line, **options), err=is_json(options))
    suggest("inspect", latents)


@click.command()
@click.argument("captions")
@click.argument("conditioning")
@click.option(
    "--pipeline",
    required=True,
    help="A diffusers pipeline: a folder or a Hub id (org/name[@revision]). Only its tokenizers "
    "and text encoders are loaded.",
)
@text_options
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
    wait_briefly(PATIENT)  # an extraction takes hours, in which other work may begin
    from ..extraction.conditioning import encode_captions

    store = encode_captions(captions, conditioning, report=report_line, **options)
    echo(store, err=is_json(options))
    suggest("inspect", conditioning)


@click.command()
@click.argument("store")
@json_option("Print JSON, including the manifest.")
@click.option(
    "--html",
    type=LOCAL_FILE,
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
    from ..inspection.describe import inspect as run

    found = run(store)
    print_result(found, as_json)
    if html is not None:
        from ..inspection.report import write_report

        echo(write_report(store, html), err=as_json)
    elif not as_json and found.details["status"] != "complete":
        suggest("status", store)
    elif not as_json:
        suggest("inspect", store, "--html", "page.html")


@click.command()
@click.argument("store")
@json_option()
def status(store: str, as_json: bool) -> None:
    """Show the progress of a STORE being written: how far, by whom, how fast, and what failed.

    With a disk budget, also which runs it follows and who waits for whom. STORE may be the
    directory of such a run, or of one that reads an object store, for what it has fetched.

    \b
    Examples:
      semroute status features
      semroute status runs/depth
    """
    from ..inspection.status import status as run

    found = run(store)
    print_result(found, as_json)
    if not as_json and found.details.get("state") == "complete":
        suggest("inspect", store)


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
    from ..inspection.hub import push as run

    echo(run(store, repo, report=report_line, **options))


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
    from ..store.verify import repair as mark_bad
    from ..store.verify import verify as run

    findings = run(store, progress=not as_json)
    print_result(findings, as_json)
    if repair and (marked := mark_bad(findings)):
        report_line(
            f"{len(marked)} shards are marked as not written; rerun the command that made them"
        )
    elif findings.bad_shards and not findings.beyond_repair and not as_json:
        suggest("verify", store, "--repair")
    if findings.problems:
        sys.exit(1)


def _compare(store: str, pipeline: str, num: int, as_json: bool) -> int:
    """Compare a store with a pipeline; returns the exit code."""
    from ..executor.workers import own_device
    from ..inspection.against import compare_with_pipeline

    comparison = compare_with_pipeline(store, pipeline, num, own_device())
    print_result(comparison, as_json)
    return int(bool(comparison.problems))
