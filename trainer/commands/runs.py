"""``semroute plot``, ``export`` and ``compare``."""

from pathlib import Path
from typing import Any

import click


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
    from ..runs.run import load_run, plot_run

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
    from ..runs.run import load_run

    trained = load_run(run, step, weights)
    if router:
        from ..runs.export import export_router

        click.echo(export_router(trained, out))
    else:
        from ..evaluation.diffusers_pipeline import export_pipeline

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
    from ..studies.compare import compare as look

    found = look(runs)
    click.echo(found.to_json() if as_json else found)
    if html is not None:
        click.echo(found.write_html(html), err=as_json)
