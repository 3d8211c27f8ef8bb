"""``semroute plot``, ``export`` and ``compare``: what runs learned, and where it goes."""

from pathlib import Path
from typing import Any

import click

from ...pipeline.commands import json_option, print_result
from .options import step_option, weights_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the figures. Default: RUN/figures."
)
@step_option
def plot(run: Path, out: Path | None, step: int | None) -> None:
    """Plot what a RUN learned: routing weights, loss, and the scores of its evaluation.

    \b
    Example:
      semroute plot runs/depth
    """
    from ..runs.figures import plot_run
    from ..runs.run import load_run

    for path in plot_run(load_run(run, step), out or run / "figures"):
        click.echo(path)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--router", is_flag=True, help="Only the router, as safetensors with its config.")
@step_option
@weights_option
def export(run: Path, out: Path, router: bool, step: int | None, weights: Any) -> None:
    """Write a RUN into the folder OUT as a diffusers pipeline.

    semroute.SemanticRoutingPipeline.from_pretrained loads it. With --router, only the router is
    written: semroute.load_router loads it, and any safetensors reader its weights.

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
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with figures.")
@json_option()
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Compare RUNS side by side: settings that differ, loss, scores, routing, speed.

    \b
    Example:
      semroute compare runs/* --html runs.html
    """
    from ..studies.compare import compare as run

    comparison = run(runs)
    print_result(comparison, as_json)
    if html is not None:
        click.echo(comparison.write_html(html), err=as_json)
