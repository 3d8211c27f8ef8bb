"""The commands that train and look at runs: parse, call, print. Imports stay inside."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..schemas import InputError, read_config
from .benchmarking import (
    conditions,
    draw_file,
    judge_options,
    judge_source,
    prompts_options,
    take_judge_options,
    take_prompts_options,
)
from .options import clock_option, sampling_options, take_solver


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--num", default=20_000, show_default=True, type=click.IntRange(1), help="Images to train on."
)
@click.option(
    "--num-test", default=600, show_default=True, type=click.IntRange(2), help="Test captions."
)
@click.option(
    "--num-dev",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Captions to tune on.",
)
@click.option(
    "--images-per-caption",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Drawn anew for each.",
)
@click.option("--seed", default=0, show_default=True, help="Of the whole world.")
def shapes(out: Path, num: int, seed: int, **sizes: Any) -> None:
    """Draw a world of captioned coloured shapes into OUT.

    OUT/train.parquet is what to train on; OUT/test.parquet holds captions that do not occur in it,
    half of them about combinations of colour and shape that do not either. OUT/dev.parquet holds
    yet others, to choose settings by.

    \b
    Example:
      semroute shapes shapes --num 20000 --seed 0
    """
    from .world import write_world

    click.echo(write_world(out, num, seed, **sizes))


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Say what it will take, and train nothing.")
@click.option(
    "--ranks", type=click.IntRange(1), help="Of a dry run: processes to plan for. Default: 1."
)
@click.option(
    "--step-seconds",
    type=click.FloatRange(0, min_open=True),
    help="Of a dry run: what a step takes, to say what the stores must deliver.",
)
@click.option(
    "--measure",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Of a dry run: take so many steps here, to see what one takes, and forget them.",
)
def train(
    config: Path,
    overrides: tuple[str, ...],
    dry_run: bool,
    ranks: int | None,
    step_seconds: float | None,
    measure: int | None,
) -> None:
    """Train as the YAML file CONFIG says; KEY=VALUE replaces single values.

    The LLM is never loaded. The same command continues what was stopped. On several GPUs:
    accelerate launch -m semroute.cli train CONFIG

    \b
    Examples:
      semroute train run.yaml routing.strategy=time optimizer.router_lr=1e-3
      semroute train run.yaml --dry-run --ranks 64 --step-seconds 0.4
    """
    parsed = read_config(config, overrides)
    if dry_run:
        if step_seconds is not None and measure is not None:
            raise InputError("give either --step-seconds or --measure")
        from .plan import plan

        click.echo(
            plan(
                parsed, num_ranks=ranks or 1, step_seconds=step_seconds, measure_steps=measure or 0
            )
        )
        return
    if not (ranks is None and step_seconds is None and measure is None):
        raise InputError("--ranks, --step-seconds and --measure are of a --dry-run")
    from .loop import TrainingInterrupted
    from .loop import train as run

    try:
        path = run(parsed)
    except TrainingInterrupted:
        sys.exit(130)
    except FloatingPointError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path} is trained: semroute plot {path}")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--features", help="Take captions from this feature store; no LLM is needed.")
@click.option(
    "--num",
    type=click.IntRange(1),
    help="Captions to take, the first ones. Default: 18 of a store, all of --prompts.",
)
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="A new prompt; may be given several times. The run's LLM is loaded to encode it.",
)
@prompts_options
@click.option(
    "--model", help="Where that LLM is now. Default: where it was when the features were extracted."
)
@click.option(
    "--vae", help="Where the VAE of its latents is now. Default: where it was when they were made."
)
@click.option("--cfg-scale", default=6.0, show_default=True, help="Guidance; 1 is none.")
@click.option(
    "--size",
    metavar="HEIGHTxWIDTH",
    help="In pixels, one of the buckets that were trained on. Default: the first of them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the pictures. Default: RUN/samples, or RUN/pictures/FILE of --prompts FILE.",
)
@sampling_options
@clock_option
def sample(
    run: Path,
    features: str | None,
    num: int | None,
    texts: tuple[str, ...],
    file: str | None,
    model: str | None,
    vae: str | None,
    size: str | None,
    out: Path | None,
    weights: Any,
    step: int | None,
    **how: Any,
) -> None:
    """Draw pictures with a trained RUN, from stored captions or new prompts.

    Where the VAE of its latents is not to be had, latents are written instead.

    With --prompts, pictures of a benchmark are laid out for its own scorer. The same command
    continues what was stopped; several processes may draw a shard each.

    \b
    Examples:
      semroute sample runs/depth --features features-test --cfg-scale 3
      semroute sample runs/depth --prompt "two red circles"
      semroute sample runs/depth --prompts evaluation_metadata.jsonl --layout geneval
    """
    if bool(texts) + (file is not None or features is not None) != 1:
        raise InputError("give either --features, --prompt or --prompts")
    benchmark = take_prompts_options(how, file)
    from .results import draw, open_run

    trained = open_run(run, step, weights)
    said = {key: value for key, value in how.items() if key != "batch_size"}
    solver = take_solver(trained, how)
    if size is not None:
        how["shape"], said["size"] = trained.latent_shape(size), size
    if file is not None:
        out = out or run / "pictures" / Path(file).stem
        decode = _decoder(trained, vae)
        draw_file(trained, file, num, features, model, decode, out, benchmark, solver, said, **how)
        return
    if features is not None:
        from ..pipeline.store import open_features

        store = open_features(features)
        trained.check_features(store.manifest.identity)
        rows = store.samples.slice(0, num or 18)["caption_ids"].to_pylist()
        ids = [row[0] for row in rows]
        wanted = store.captions["text"].take(ids).to_pylist()
        source = store
    else:
        wanted = list(texts[:num])
        source, ids = conditions(trained, wanted, None, None, model)
    decoder = None
    try:
        decoder = _decoder(trained, vae)
    except InputError as error:
        if vae is not None:
            raise
        click.echo(f"{error}\nSo latents are written, not pictures. Name it with --vae.", err=True)
    folder = out or run / "samples"
    for path in draw(trained, source, ids, wanted, decoder, folder, solver, **how):
        click.echo(path)


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--features", help="Feature store of the captions to judge by.")
@click.option("--samples", help="The test.parquet of the shapes that they were extracted from.")
@judge_options
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
@sampling_options
@clock_option
def evaluate(
    run: str,
    features: str | None,
    samples: str | None,
    judge: str | None,
    weights: Any,
    step: int | None,
    **how: Any,
) -> None:
    """Score a RUN on the captions of a shapes world, skill by skill, with chance beside.

    Writes RUN/evaluation.json, and pictures of some judged images into RUN/figures.

    With --judge, RUN is a folder of pictures that semroute sample wrote, a run of which that is
    RUN/samples, or a table of captions and images; and a vision-language model is asked whether
    each picture shows its caption.

    \b
    Examples:
      semroute evaluate runs/depth --features features-test --samples shapes/test.parquet
      semroute evaluate geneval --judge Qwen/Qwen2.5-VL-7B-Instruct
    """
    options = take_judge_options(how, judge)
    if judge is not None:
        judge_source(run, judge, options)
        return
    if features is None or samples is None:
        raise InputError("give --judge, or --features and --samples")
    from ..pipeline.store import open_features
    from .results import open_run, score_run

    trained = open_run(Path(run), step, weights)
    store = open_features(features)
    trained.check_features(store.manifest.identity)
    solver = take_solver(trained, how)
    decode = _decoder(trained)
    for path in score_run(trained, store, samples, decode, solver, report=click.echo, **how):
        click.echo(path)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/figures.")
@click.option("--step", type=click.IntRange(0), help="Which checkpoint. Default: the newest.")
def plot(run: Path, out: Path | None, step: int | None) -> None:
    """Draw what a RUN learned: routing weights, loss, and the scores of its evaluation.

    \b
    Example:
      semroute plot runs/depth
    """
    from .results import plot_run
    from .run import load_run

    for path in plot_run(load_run(run, step), out or run / "figures"):
        click.echo(path)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--router", is_flag=True, help="The router alone, as safetensors with its config.")
@click.option("--step", type=click.IntRange(0), help="Which checkpoint. Default: the newest.")
@click.option(
    "--weights",
    default="ema",
    show_default=True,
    type=click.Choice(["ema", "model"]),
    help="The moving average, or the weights themselves.",
)
def export(run: Path, out: Path, router: bool, step: int | None, weights: Any) -> None:
    """Write a RUN into the folder OUT, as a pipeline of diffusers.

    semroute.SemanticRoutingPipeline.from_pretrained loads it. With --router only the router is
    written, which semroute.load_router loads, and whose weights any reader of safetensors.

    \b
    Examples:
      semroute export runs/depth pipeline
      semroute export runs/depth router --router
    """
    from .run import load_run

    trained = load_run(run, step, weights)
    if router:
        from .export import export_router

        click.echo(export_router(trained, out))
    else:
        from .diffusion import export_pipeline

        click.echo(export_pipeline(trained, out))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with figures, too.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Put RUNS beside each other: settings that differ, loss, scores, routing, speed.

    \b
    Example:
      semroute compare runs/* --html runs.html
    """
    from .comparison import compare as look

    found = look(runs)
    click.echo(found.to_json() if as_json else found)
    if html is not None:
        click.echo(found.write_html(html), err=as_json)


def _decoder(run: Any, vae: str | None = None) -> Callable[[Any], Any]:
    """Latents of a run -> images uint8 ``[n, H, W, 3]``."""
    from ..pipeline.autoencoder import open_decoder

    device = str(next(run.model.parameters()).device)
    return open_decoder(run.record.latents, vae or run.record.vae_source, device)
