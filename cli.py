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

NUM_JUDGED = 24
"""Images that evaluate shows."""
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


def _work_options(*, limit: bool = True) -> Callable[[F], F]:
    """Options of every command that fills a store."""
    rows = [click.option("--limit", type=click.IntRange(1), help="Only the first rows.")]
    options = [
        *(rows if limit else []),
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
        click.option("--force", is_flag=True, help="Begin although the disk has too little space."),
    ]

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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
    "--codec",
    default="bf16",
    show_default=True,
    type=_CODECS,
    help="How hidden states are stored: from exact and fast to read, to a sixth of the bytes.",
)
@_quality_option
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
@_work_options()
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
@_work_options()
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
@_work_options(limit=False)
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


def _sampling_options(command: F) -> F:
    """Options of every command that samples from a run."""
    for option in reversed(
        [
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
            click.option(
                "--step", type=click.IntRange(0), help="Which checkpoint. Default: the newest."
            ),
        ]
    ):
        command = option(command)
    return command


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
    cfg_scale: float,
    out: Path | None,
    num_steps: int,
    seed: int,
    batch_size: int,
    weights: Any,
    step: int | None,
) -> None:
    """Draw pictures with a trained RUN, from stored captions or new prompts.

    \b
    Examples:
      semroute sample runs/depth --features features-test --cfg-scale 3
      semroute sample runs/depth --prompt "two red circles"
    """
    if (features is None) == (not prompts):
        raise InputError("give either --features or --prompt")
    trained = _open_run(run, step, weights)
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

    from .trainer.evaluation import generate
    from .trainer.plots import sample_grid, save_images

    latents = generate(
        trained.model,
        trained.flow,
        source,
        ids,
        num_steps=num_steps,
        cfg_scale=cfg_scale,
        seed=seed,
        batch_size=batch_size,
    )
    images = _decoder(trained)(latents)
    out = out or run / "samples"
    for path in save_images(out, images, texts, sample_grid(images, texts)):
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
    run: Path,
    features: Path,
    samples: str,
    cfg_scales: tuple[float, ...],
    images_per_caption: int,
    num_steps: int,
    seed: int,
    batch_size: int,
    weights: Any,
    step: int | None,
) -> None:
    """Score a RUN on the captions of a shapes world, skill by skill, with chance beside.

    Writes RUN/evaluation.json, and pictures of some judged images into RUN/figures.

    \b
    Example:
      semroute evaluate runs/depth --features features-test --samples shapes/test.parquet
    """
    import numpy as np
    import pyarrow.parquet

    from .pipeline.store import open_features
    from .trainer.evaluation import Report
    from .trainer.evaluation import evaluate as judge
    from .trainer.plots import sample_grid
    from .trainer.shapes import judge as judge_image
    from .trainer.shapes import read_scenes

    trained = _open_run(run, step, weights)
    store = open_features(features)
    trained.check_features(store.manifest.identity)
    try:
        table = pyarrow.parquet.read_table(samples)
    except (OSError, ValueError) as error:
        raise InputError(f"--samples {samples}: {error}") from error
    scenes, splits = read_scenes(table), table["split"].to_pylist()
    ids = [row[0] for row in store.samples["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != table["text"].to_pylist():
        raise InputError(f"{features} was not extracted from {samples}: the captions differ")
    evaluations, written = {}, []
    for cfg_scale in cfg_scales:
        evaluations[cfg_scale], images = judge(
            trained.model,
            trained.flow,
            store,
            ids * images_per_caption,
            scenes * images_per_caption,
            splits * images_per_caption,
            _decoder(trained),
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            seed=seed,
            batch_size=batch_size,
        )
        click.echo(f"guidance {cfg_scale:g}, {len(images)} images\n{evaluations[cfg_scale]}\n")
        shown = np.linspace(0, len(ids) - 1, min(NUM_JUDGED, len(ids))).astype(int)
        marks = [judge_image(images[i], scenes[i])["all"] for i in shown]
        texts = table["text"].take(shown).to_pylist()
        path = run / "figures" / f"judged-cfg-{cfg_scale:g}.png"
        path.parent.mkdir(exist_ok=True)
        sample_grid(images[shown], texts, marks).savefig(path, dpi=150)
        written.append(path)
    report = Report(trained.step, weights, str(features), num_steps, seed, evaluations)
    for path in (*written, report.write(run)):
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


def _open_run(path: Path, step: int | None, weights: Any) -> Any:
    """A run to sample from, on the GPU where there is one."""
    import torch

    from .trainer.checkpoint import load_run

    run = load_run(path, step, weights)
    run.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return run


def _decoder(run: Any) -> Callable[[Any], Any]:
    """Latents of a run -> images uint8 ``[n, H, W, 3]``."""
    from .pipeline.latents import latents_to_images

    identity = run.record.latents
    return functools.partial(latents_to_images, scale=identity.scale, shift=identity.shift)


if __name__ == "__main__":
    cli()
