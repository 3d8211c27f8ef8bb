"""``semroute probe`` and ``rewrite``, which may read the routing of a run."""

from pathlib import Path
from typing import Any

import click

from ...pipeline.commands import (
    CODECS,
    interruptible,
    is_json,
    quality_option,
    report_line,
    work_options,
)
from ...schemas import InputError


@click.command()
@click.argument("features")
@click.argument("labels")
@click.option("--text-column", help="Of LABELS. Default: text, prompt or caption.")
@click.option(
    "--label",
    "names",
    multiple=True,
    help="Column, with dots into JSON: scene.relation. May be given several times. Default: all "
    "with few enough classes.",
)
@click.option(
    "--pool",
    type=click.Choice(["mean", "last"]),
    default="mean",
    show_default=True,
    help="Of a caption's tokens.",
)
@click.option(
    "--num-captions",
    type=click.IntRange(1),
    default=5_000,
    show_default=True,
    help="Of the store at most.",
)
@click.option("--routing", type=click.Path(path_type=Path), help="A run, to draw what it reads.")
@click.option(
    "--figure", type=click.Path(path_type=Path, dir_okay=False), help="Draw accuracy by layer."
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def probe(
    features: str,
    labels: str,
    names: tuple[str, ...],
    routing: Path | None,
    figure: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say which layer of FEATURES knows what: linear probes for the LABELS of captions.

    LABELS is a table with the captions and columns of labels. Probes are fitted in closed form to
    three fifths of the captions, and judged on others. No LLM is run.

    \b
    Examples:
      semroute probe features shapes/train.parquet --label scene --figure knowledge.png
      semroute probe features partiprompts.tsv --text-column Prompt --label Category
    """
    if routing is not None and figure is None:
        raise InputError("--routing is drawn: name a picture with --figure")
    read = None
    if routing is not None:
        from ...pipeline.store.open import open_features
        from ..runs.run import load_run

        read = load_run(routing).routing(open_features(features).manifest.identity)
    from ...pipeline.inspection.linear_probe import probe_layers

    found = probe_layers(features, labels, labels=names, progress=not as_json, **options)
    click.echo(found.to_json() if as_json else found)
    if figure is not None:
        from ...pipeline.inspection import figures
        from ...pipeline.style import DPI

        figures.knowledge(found, read).savefig(figure, dpi=DPI)
        click.echo(figure, err=as_json)


@click.command()
@click.argument("features")
@click.argument("out")
@click.option("--codec", type=CODECS, help="Default: as it is.")
@quality_option
@click.option("--layers", default="all", show_default=True, help="all, every:3 or 1-10,17.")
@click.option(
    "--routing",
    type=click.Path(path_type=Path),
    help="A run: store only the mixes of layers that its blocks read.",
)
@click.option(
    "--shuffle-layers",
    type=click.IntRange(0),
    metavar="SEED",
    help="A control: within each caption, layers change places at random. For --codec bf16.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="How many mixes. Default: the fewest whose error of what blocks read is under 1e-2.",
)
@click.option("--captions", help="Only those of this table, whose rows are the new samples.")
@click.option("--text-column", help="Of the table. Default: text, prompt or caption.")
@work_options
@interruptible
def rewrite(features: str, out: str, routing: Path | None, **options: Any) -> None:
    """Write FEATURES once more into OUT: another codec, fewer layers or captions. No LLM is run.

    With --routing OUT holds no layers, but mixes of them, from which that run can sample and runs
    with routing.strategy=mixes can train. The same command continues what was interrupted.

    \b
    Examples:
      semroute rewrite features smaller --codec linear --layers every:2
      semroute rewrite features mixed --routing runs/depth
    """
    from ...pipeline.extraction.rewrite import rewrite as run

    if routing is not None:
        from ...pipeline.store.open import open_features
        from ..runs.run import load_run

        identity = open_features(features).manifest.identity
        options["routing"] = load_run(routing).routing(identity)
    click.echo(run(features, out, report=report_line, **options), err=is_json(options))
