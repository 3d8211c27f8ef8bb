"""The command line: parse, call, print. Heavy imports stay inside the commands."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from . import __version__
from .pipeline.cluster import DISK_FULL, Interrupted
from .pipeline.layout import parse_bytes
from .schemas import MAX_QUALITY, MIN_QUALITY, InputError, read_config

F = TypeVar("F", bound=Callable[..., Any])


class _Commands(click.Group):
    """Commands whose bad input ends in one message, not in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = f" while writing {error.filename}" if error.filename else ""
            raise click.ClickException(
                f"the disk is full{where}. Free some space and run the same command again."
            ) from error


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


_CODECS = click.Choice(["bf16", "lossless", "delta", "linear"])
_quality_option = click.option(
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
        help="Preset (bos, describe, paper) or a file that holds {caption}.",
    ),
    click.option("--keep-prefix", is_flag=True, help="Store the template's prefix rows too."),
    click.option(
        "--layers",
        default="all",
        show_default=True,
        help="all, every:3 (counted from the last), or 5,11,17.",
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
_work_options = _together(
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
    click.option("--force", is_flag=True, help="Begin although the disk has too little space."),
)
"""Of every command that fills a store."""


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--num", default=20_000, show_default=True, type=click.IntRange(1), help="Images to train on."
)
@click.option(
    "--num-test", default=600, show_default=True, type=click.IntRange(2), help="Test captions."
)
@click.option(
    "--images-per-caption",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Drawn anew for each.",
)
@click.option("--seed", default=0, show_default=True, help="Of the whole world.")
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
@_plan_options
@click.option(
    "--codec",
    default="bf16",
    show_default=True,
    type=_CODECS,
    help="How hidden states are stored: from exact and fast to read, to a sixth of the bytes.",
)
@_quality_option
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
@_limit_option
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
@click.argument("captions")
@_plan_options
@_limit_option
@click.option("--codec", type=_CODECS, help="Default: all, side by side.")
@_quality_option
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
    from .pipeline import estimation, extraction, planning, probing

    names = ("codec", "quality", "samples_per_second", "passes")
    how = {name: options.pop(name) for name in names}
    plan = planning.make_plan(captions, **options)
    plan.report_cuts(_report)
    probed = probing.run_probe(plan, extraction.default_batch_tokens()) if probe else None
    found = estimation.estimate(plan, probe=probed, **how)
    click.echo(found.to_json() if as_json else found)


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
@_limit_option
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
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with figures: norms, massive activations, similarity and error by layer, "
    "lengths, and a search over captions.",
)
def inspect(store: Path, as_json: bool, html: Path | None) -> None:
    """Say what a feature or latent STORE holds, finished or not.

    \b
    Examples:
      semroute inspect features --json
      semroute inspect features --html features.html
    """
    from .pipeline.inspection import inspect as look

    if html is not None:
        from .pipeline.report import write_report

        click.echo(write_report(store, html))
        return
    found = look(store)
    click.echo(found.to_json() if as_json else found)


@cli.command()
@click.argument("features", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--codec", type=_CODECS, help="Default: as it is.")
@_quality_option
@click.option("--layers", default="all", show_default=True, help="all, every:3 or 5,11,17.")
@click.option(
    "--routing",
    type=click.Path(path_type=Path),
    help="A run: store only the mixes of layers that its blocks read.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="How many mixes. Default: the fewest whose error of what blocks read is under 1e-2.",
)
@click.option("--captions", help="Only those of this table, whose rows are the new samples.")
@click.option("--text-column", help="Of the table. Default: text, prompt or caption.")
@_work_options
@_interruptible
def rewrite(features: Path, out: Path, routing: Path | None, **options: Any) -> None:
    """Write FEATURES once more into OUT: another codec, fewer layers or captions. No LLM is run.

    With --routing OUT holds no layers, but mixes of them, from which that run can sample and runs
    with routing.strategy=mixes can train. The same command continues what was interrupted.

    \b
    Examples:
      semroute rewrite features smaller --codec linear --layers every:2
      semroute rewrite features mixed --routing runs/depth
    """
    from .pipeline.rewriting import rewrite as run

    if routing is not None:
        from .pipeline.store import open_features
        from .trainer.checkpoint import load_run

        identity = open_features(features).manifest.identity
        options["routing"] = load_run(routing).routing(identity)
    click.echo(run(features, out, report=_report, **options))


@cli.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--repair", is_flag=True, help="Mark bad shards as not written.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def verify(store: Path, repair: bool, as_json: bool) -> None:
    """Read the whole of STORE and compare it with what was written.

    Every checksum, range of rows, receipt and key of the manifest. Ends with 1 where something is
    wrong. After --repair, the command that made the store writes just the bad shards anew.

    \b
    Example:
      semroute verify features --repair
    """
    from .pipeline import verification

    found = verification.verify(store, progress=not as_json)
    click.echo(found.to_json() if as_json else found)
    if repair and (marked := verification.repair(found)):
        _report(f"{len(marked)} shards are marked as not written: run the command that made them")
    if found.problems:
        sys.exit(1)


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train as the YAML file CONFIG says; KEY=VALUE replaces single values.

    The LLM is never loaded. The same command continues what was stopped. On several GPUs:
    accelerate launch -m semroute.cli train CONFIG

    \b
    Example:
      semroute train run.yaml routing.strategy=time optimizer.router_lr=1e-3
    """
    from .trainer.loop import TrainingInterrupted
    from .trainer.loop import train as run

    parsed = read_config(config, overrides)
    try:
        path = run(parsed)
    except TrainingInterrupted:
        sys.exit(130)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path} is trained: semroute plot {path}")


_sampling_options = _together(
    click.option(
        "--num-steps",
        default=50,
        show_default=True,
        type=click.IntRange(1),
        help="Of Euler's method.",
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
"""Of every command that samples from a run."""


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    help="Take captions from this feature store; no LLM is needed.",
)
@click.option(
    "--num",
    default=18,
    show_default=True,
    type=click.IntRange(1),
    help="Captions to take, the first ones of the store's samples.",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="A new prompt; may be given several times. The run's LLM is loaded to encode it.",
)
@click.option(
    "--model", help="Where that LLM is now. Default: where it was when the features were extracted."
)
@click.option("--cfg-scale", default=6.0, show_default=True, help="Guidance; 1 is none.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the pictures. Default: RUN/samples."
)
@_sampling_options
def sample(
    run: Path,
    features: Path | None,
    num: int,
    prompts: tuple[str, ...],
    model: str | None,
    out: Path | None,
    weights: Any,
    step: int | None,
    **how: Any,
) -> None:
    """Draw pictures with a trained RUN, from stored captions or new prompts.

    \b
    Examples:
      semroute sample runs/depth --features features-test --cfg-scale 3
      semroute sample runs/depth --prompt "two red circles"
    """
    if (features is None) == (not prompts):
        raise InputError("give either --features or --prompt")
    from .trainer.results import draw, open_run

    trained = open_run(run, step, weights)
    if features is not None:
        from .pipeline.store import open_features

        store = open_features(features)
        trained.check_features(store.manifest.identity)
        rows = store.samples.slice(0, num)["caption_ids"].to_pylist()
        ids = [row[0] for row in rows]
        texts = store.captions["text"].take(ids).to_pylist()
        source: Any = store
    else:
        from .pipeline.extraction import encode_prompts

        record = trained.record
        source = encode_prompts(prompts, record.features, model or record.model_source)
        texts, ids = list(prompts), list(range(1, len(prompts) + 1))

    out = out or run / "samples"
    for path in draw(trained, source, ids, texts, _decoder(trained), out, **how):
        click.echo(path)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--features",
    required=True,
    type=click.Path(path_type=Path),
    help="Feature store of the captions to judge by.",
)
@click.option(
    "--samples", required=True, help="The test.parquet of the shapes that they were extracted from."
)
@click.option(
    "--cfg-scale",
    "cfg_scales",
    multiple=True,
    default=(1.0, 3.0),
    show_default=True,
    help="Guidance; may be given several times.",
)
@click.option(
    "--images-per-caption",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Sampled from different noise.",
)
@_sampling_options
def evaluate(
    run: Path, features: Path, samples: str, weights: Any, step: int | None, **how: Any
) -> None:
    """Score a RUN on the captions of a shapes world, skill by skill, with chance beside.

    Writes RUN/evaluation.json, and pictures of some judged images into RUN/figures.

    \b
    Example:
      semroute evaluate runs/depth --features features-test --samples shapes/test.parquet
    """
    from .pipeline.store import open_features
    from .trainer.results import open_run, score_run

    trained = open_run(run, step, weights)
    store = open_features(features)
    trained.check_features(store.manifest.identity)
    for path in score_run(trained, store, samples, _decoder(trained), report=click.echo, **how):
        click.echo(path)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/figures.")
@click.option("--step", type=click.IntRange(0), help="Which checkpoint. Default: the newest.")
def plot(run: Path, out: Path | None, step: int | None) -> None:
    """Draw what a RUN learned: routing weights, loss, and the scores of its evaluation.

    \b
    Example:
      semroute plot runs/depth
    """
    from .trainer.checkpoint import load_run
    from .trainer.evaluation import Report
    from .trainer.plots import plot_run

    trained = load_run(run, step)
    for path in plot_run(trained, out or run / "figures", report=Report.read(run)):
        click.echo(path)


def _decoder(run: Any) -> Callable[[Any], Any]:
    """Latents of a run -> images uint8 ``[n, H, W, 3]``."""
    from .pipeline.latents import latents_to_images

    identity = run.record.latents
    return functools.partial(latents_to_images, scale=identity.scale, shift=identity.shift)


if __name__ == "__main__":
    cli()
