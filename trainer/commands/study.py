"""The commands that ask many runs, or one run many questions: parse, call, print."""

import sys
from pathlib import Path
from typing import Any

import click

from .options import clock_option


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time. Default: one a GPU, or one a core where there is none.",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    help="Only this arm, and those that it is compared with; may be given several times. What is "
    "known of others is kept.",
)
@click.option(
    "--report-only", is_flag=True, help="Only make the report, of the runs that are done."
)
def study(
    config: Path,
    overrides: tuple[str, ...],
    jobs: int | None,
    arms: tuple[str, ...],
    report_only: bool,
) -> None:
    """Train and judge all arms and seeds of the YAML file CONFIG, and report.

    The same command continues what was stopped. Into the study's folder go the runs, all judgements
    as results.parquet, and the report with its figures. Without scoring, runs are only trained.

    \b
    Example:
      semroute study studies/smoke.yaml
    """
    from ...pipeline.models.vae import open_decoder
    from ...schemas import StudyConfig, parse, read_yaml
    from ..studies.job import list_jobs
    from ..studies.report import write_report
    from ..studies.runner import run_study

    parsed = parse(StudyConfig, read_yaml(config, overrides), str(config))
    if arms:
        parsed = parsed.only(arms)
    if not report_only:
        try:
            run_study(parsed, open_decoder, num_jobs=jobs, report=click.echo)
        except KeyboardInterrupt:
            click.echo("Stopped. Run the same command to continue.", err=True)
            sys.exit(130)
    if parsed.scoring is None and not report_only:
        for job in list_jobs(parsed):
            click.echo(job.path)
        return
    for path in write_report(parsed):
        click.echo(path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
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
    default=(3.0,),
    show_default=True,
    help="Guidance; may be given several times.",
)
@click.option("--leave-one-out", is_flag=True, help="Each layer in turn without its weight, too.")
@click.option(
    "--num-steps", default=50, show_default=True, type=click.IntRange(1), help="Of Euler's method."
)
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the report.")
def ablate(
    runs: tuple[Path, ...],
    features: Path,
    samples: str,
    cfg_scales: tuple[float, ...],
    leave_one_out: bool,
    num_steps: int,
    seed: int,
    out: Path,
) -> None:
    """Judge RUNS under other routing weights than they learned.

    Weights are replaced by their mean over blocks, in reverse order, by uniform ones, cut to the
    three largest, and with several runs of one arm by those of the next. Where they depend on t,
    they are replaced by their mean over t. With --leave-one-out figures/layers.png shows what each
    layer is worth beside the weight it has. What is judged is kept: the same command goes on where
    it was stopped.

    \b
    Example:
      semroute ablate studies/shapes/runs/depth/seed-* --out ablation \\
        --features world/features-test --samples world/shapes/test.parquet
    """
    import numpy as np
    from tqdm.auto import tqdm

    from ...pipeline.models.vae import open_decoder
    from ...schemas import Scoring
    from ..runs.run import open_run
    from ..studies.ablation import TRAINED, WITHOUT, weights_of
    from ..studies.ablation import ablate as swap
    from ..studies.figures import left_out_panels
    from ..studies.report import write_comparison
    from ..studies.results import ResultsTable
    from ..studies.runner import RESULTS
    from ..studies.statistics import Outline

    scoring = Scoring(
        features=str(features),
        samples=samples,
        cfg_scales=list(cfg_scales),
        num_steps=num_steps,
        seed=seed,
    )
    trained = [open_run(run, None, "ema") for run in runs]
    archive = ResultsTable(out / RESULTS, ("arm", "seed"))
    results = swap(
        trained, scoring, open_decoder, archive, leave_one_out=leave_one_out, report=tqdm.write
    )
    arms = list(dict.fromkeys(results["arm"].to_pylist()))
    references = dict.fromkeys(arms, TRAINED)
    outline = Outline(out.name, arms, references, scoring, len(runs), unit="runs")
    more = {}
    left_out = {layer: WITHOUT.format(layer) for layer in trained[0].layers}
    if not {*left_out.values()}.isdisjoint(arms):
        weights = np.mean([weights_of(run, num_steps).numpy() for run in trained], 0)
        more["layers"] = lambda claims: left_out_panels(claims, left_out, weights, outline)
    for path in [out / RESULTS, *write_comparison(results, outline, out, more)]:
        click.echo(path)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--features",
    required=True,
    type=click.Path(path_type=Path),
    help="Feature store whose captions are drawn.",
)
@click.option(
    "--num",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Captions to draw, the first ones of the store's samples.",
)
@click.option(
    "--cfg-scale",
    "cfg_scales",
    multiple=True,
    default=(1.0, 1.5, 3.0, 6.0),
    show_default=True,
    help="Guidance; may be given several times.",
)
@click.option(
    "--solver",
    "methods",
    multiple=True,
    default=("euler", "heun"),
    show_default=True,
    type=click.Choice(["euler", "heun"]),
    help="May be given several times.",
)
@click.option(
    "--num-steps", default=50, show_default=True, type=click.IntRange(2), help="Of the solver."
)
@click.option("--seed", default=0, show_default=True, help="Of the noise.")
@click.option(
    "--batch-size",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Images sampled at once.",
)
@clock_option
def lag(
    run: Path, features: Path, num: int, num_steps: int, clock: str, seed: int, **how: Any
) -> None:
    """Measure how noisy latents really are on the way of a RUN, against the nominal noise level.

    By the oracle, which knows where each trajectory ended, and by an estimate from x_t alone that
    is calibrated on forward-noised latents. Writes RUN/lag.parquet and RUN/figures/lag.png.

    \b
    Example:
      semroute lag runs/time --features features-test --cfg-scale 1 --cfg-scale 6
    """
    from ...pipeline.store.open import open_features
    from ..diffusion.sampling import SamplingConfig
    from ..evaluation.lag import report_lag
    from ..runs.run import open_run

    trained = open_run(run, None, "ema")
    store = open_features(features)
    trained.check_features(store.manifest.identity)
    solver = SamplingConfig(num_steps, clock=trained.clock(clock))
    for line in report_lag(trained, store, num, solver, seed=seed, **how):
        click.echo(line)
