"""``semroute plot``, ``export`` and ``compare``: what runs learned, and where it goes."""

from pathlib import Path
from typing import Any

import click

from ...pipeline.commands.options import LOCAL_PATH, echo, json_option, print_result, report_line
from ...schemas import InputError
from .options import refuse_options, step_option, was_given, weights_option

KINDS = ("pipeline", "lora", "comfyui", "weights", "config")
"""Forms of :data:`semroute.trainer.runs.adapter_export.KINDS`."""


@click.command()
@click.argument("run", type=LOCAL_PATH)
@click.option("--out", type=LOCAL_PATH, help="Folder of the figures. Default: RUN/figures.")
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
        echo(path)


@click.command()
@click.argument("run", type=LOCAL_PATH)
@click.argument("out", type=LOCAL_PATH)
@click.option(
    "--as",
    "kind",
    type=click.Choice(KINDS),
    help="Form of what a run on a pretrained network learned. Default: pipeline.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="With --as lora of gains of layers (FLUX.2): its rank. Default: the exact one.",
)
@click.option("--router", is_flag=True, help="Only the router, as safetensors with its config.")
@step_option
@weights_option
def export(
    run: Path,
    out: Path,
    kind: Any,
    rank: int | None,
    router: bool,
    step: int | None,
    weights: Any,
) -> None:
    """Write what a RUN learned into the folder OUT.

    A network of semroute's own is written as a diffusers pipeline, which
    semroute.SemanticRoutingPipeline.from_pretrained loads. With --router, only the router is
    written: semroute.load_router loads it, and any safetensors reader its weights.

    Of a run on a pretrained network, --as chooses the form. lora: load_lora_weights of diffusers
    loads it, or peft. comfyui: ComfyUI's loader of LoRA loads it. weights: numbers of layers.
    config: one layer in each place, as a setting of diffusers. pipeline: everything, for
    semroute.attach. What a run learned has not all of these forms. RUN may be the folder of an
    earlier --as pipeline.

    \b
    Examples:
      semroute export runs/depth pipeline
      semroute export runs/depth router --router
      semroute export runs/krea2 lora --as lora
    """
    from ..runs.adapter import is_export, load_adapter
    from ..runs.export import export_router
    from ..runs.record import read_record

    if router:
        refuse_options(["kind", "rank"], "is not used with --router: leave it out")
    if not is_export(run) and read_record(run).pretrained is None:
        if kind is not None and kind != "pipeline":
            raise InputError(
                f"--as {kind} is for runs on a pretrained network, and {run} trained a network of "
                "semroute's own: choose --as pipeline or --router"
            )
        refuse_options(["rank"], "is for --as lora: leave it out")
        from ..runs.run import load_run

        trained = load_run(run, step, weights)
        if router:
            echo(export_router(trained, out))
            return
        from ..evaluation.diffusers_pipeline import export_pipeline

        echo(export_pipeline(trained, out))
        return
    adapter = load_adapter(run, step, weights if was_given("weights") else None)
    if router:
        echo(export_router(adapter, out))
        return
    from ..runs.adapter_export import export_adapter

    done = export_adapter(adapter, out, kind or "pipeline", rank)
    echo(done.folder)
    if done.note:
        report_line(done.note)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=LOCAL_PATH)
@click.option("--html", type=LOCAL_PATH, help="Also write a page with figures.")
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
        echo(comparison.write_html(html), err=as_json)
