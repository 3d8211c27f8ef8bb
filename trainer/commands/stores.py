"""``semroute probe`` and ``rewrite``, which may read the routing of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...pipeline.commands.options import (
    CODECS,
    LOCAL_FILE,
    LOCAL_PATH,
    RANK,
    SEED,
    echo,
    exact_option,
    interruptible,
    is_json,
    json_option,
    layers_option,
    print_result,
    quality_option,
    report_line,
    suggest,
    text_options,
    work_options,
)
from ...schemas import InputError, check_writable
from .options import refuse_options

if TYPE_CHECKING:
    from ...schemas import Routing


@click.command()
@click.argument("features")
@click.argument("labels")
@click.option(
    "--text-column", help="Column of captions in LABELS. Default: text, prompt or caption."
)
@click.option(
    "--label",
    "names",
    multiple=True,
    help="Column of labels, with dots to reach into JSON: scene.relation. May be given several "
    "times. Default: all with few enough classes.",
)
@click.option(
    "--pool",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="One vector per caption: the mean of its tokens, or the last.",
)
@click.option(
    "--num-captions",
    type=click.IntRange(1),
    default=5_000,
    show_default=True,
    help="Largest number of captions to use.",
)
@click.option(
    "--routing",
    type=LOCAL_PATH,
    help="With --figure: a run; the figure then also shows the layers that it reads.",
)
@click.option(
    "--figure",
    type=LOCAL_FILE,
    help="Image file to plot accuracy by layer into.",
)
@json_option()
def probe(
    features: str,
    labels: str,
    names: tuple[str, ...],
    routing: Path | None,
    figure: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show which layers of FEATURES know the LABELS of captions, by linear probes.

    LABELS is a table with captions and columns of labels. Probes are fitted in closed form to three
    fifths of the captions and tested on others. No LLM is run.

    \b
    Examples:
      semroute probe features shapes/train.parquet --label scene --figure knowledge.png
      semroute probe features partiprompts.tsv --text-column Prompt --label Category
    """
    if routing is not None and figure is None:
        raise InputError("--routing is for the figure: name its file with --figure")
    if figure is not None:
        check_writable(figure)
    weights = None if routing is None else read_routing(routing, features)
    from ...pipeline.inspection.linear_probe import probe_layers

    results = probe_layers(features, labels, labels=names, progress=not as_json, **options)
    print_result(results, as_json)
    if figure is not None:
        from ...pipeline.inspection.figures import probe_accuracy
        from ...pipeline.style import DPI

        probe_accuracy(results, weights).savefig(figure, dpi=DPI)
        echo(figure, err=as_json)


@click.command()
@click.argument("features")
@click.argument("out")
@click.option("--codec", type=CODECS, help="Default: the codec of FEATURES.")
@quality_option
@exact_option
@layers_option
@click.option(
    "--routing",
    type=LOCAL_PATH,
    help="A run: store only the mixes of layers that its blocks read.",
)
@click.option(
    "--shuffle-layers",
    type=SEED,
    metavar="SEED",
    help="A control: shuffle the layers of each caption at random. Needs codec bf16.",
)
@click.option(
    "--rank",
    type=RANK,
    help="With --routing: number of mixes. Default: the fewest with an error below 1e-2 in what "
    "blocks read. Without: the rank of codec predictive, as for extract.",
)
@click.option(
    "--captions", help="Keep only the captions of this table, whose rows become the samples."
)
@text_options
@work_options
@interruptible()
def rewrite(features: str, out: str, routing: Path | None, **options: Any) -> None:
    """Rewrite FEATURES into OUT with another codec, fewer layers or captions. No LLM is run.

    With --routing, OUT holds mixes of layers instead of layers: that run can sample from them, and
    runs with routing.strategy=mixes can train on them. Rerun the same command to resume.

    \b
    Examples:
      semroute rewrite features smaller --codec predictive --layers every:2
      semroute rewrite features mixed --routing runs/depth
    """
    if options["captions"] is None:
        refuse_options(
            ["text_column", "fallback_column", "blank"],
            "is about a table: name it with --captions",
        )
    from ...pipeline.extraction.rewrite import rewrite as run

    if routing is not None:
        options["routing"] = read_routing(routing, features)
    echo(run(features, out, report=report_line, **options), err=is_json(options))
    suggest("inspect", out)


def read_routing(run: Path, features: str) -> Routing:
    """The routing weights of a run that reads these features."""
    from ...pipeline.store.open import open_features
    from ..runs.run import load_run

    return load_run(run).routing(open_features(features).manifest.identity)
