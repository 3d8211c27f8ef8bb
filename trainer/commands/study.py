"""``semroute study``, ``ablate`` and ``lag``: many runs, or one run many times."""

from pathlib import Path
from typing import Any

import click

from ...pipeline.commands.options import LOCAL_PATH, echo, interruptible
from ...schemas import check_writable
from .options import (
    SOLVERS,
    STOPPED,
    batch_size_option,
    cfg_scales_option,
    clock_option,
    dtype_option,
    num_steps_option,
    refuse_options,
    scoring_options,
    seed_option,
)


@click.command()
@click.argument("config", type=LOCAL_PATH)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs at a time. Default: one per GPU, or one per CPU core if there is none.",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    help="Only this arm and those that it is compared with; may be given several times. Scores of "
    "other arms are kept.",
)
@click.option(
    "--report-only", is_flag=True, help="Only write the report, on the runs that are done."
)
def study(
    config: Path,
    overrides: tuple[str, ...],
    jobs: int | None,
    arms: tuple[str, ...],
    report_only: bool,
) -> None:
    """Train and score all arms and seeds of the YAML file CONFIG, and write a report.

    The study's folder holds the runs, all scores as results.parquet, and the report with its
    figures. If CONFIG has no scoring, runs are only trained. Rerun the same command to resume.

    \b
    Example:
      semroute study studies/smoke.yaml
    """
    from ...pipeline.models.vae import open_decoder
    from ...schemas import StudyConfig, parse, read_yaml
    from ..studies.job import list_jobs
    from ..studies.report import write_report
    from ..studies.runner import run_study

    if report_only:
        refuse_options(["jobs"], "is not used with --report-only, which runs nothing: leave it out")
    parsed = parse(StudyConfig, read_yaml(config, overrides), str(config))
    if arms:
        parsed = parsed.only(arms)
    if not report_only:
        with interruptible(KeyboardInterrupt, STOPPED):
            run_study(parsed, open_decoder, num_jobs=jobs, report=echo)
    if parsed.scoring is None and not report_only:
        for job in list_jobs(parsed):
            echo(job.path)
        return
    for path in write_report(parsed):
        echo(path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=LOCAL_PATH)
@scoring_options(required=True)
@cfg_scales_option(3.0)
@click.option("--leave-one-out", is_flag=True, help="Also score without each layer in turn.")
@num_steps_option(help="Steps of Euler's method.")
@seed_option
@click.option("--out", required=True, type=LOCAL_PATH, help="Folder of the report.")
def ablate(
    runs: tuple[Path, ...],
    features: str,
    samples: str,
    cfg_scales: tuple[float, ...],
    leave_one_out: bool,
    num_steps: int,
    seed: int,
    out: Path,
) -> None:
    """Score RUNS under routing weights other than those they learned.

    The weights are replaced by their mean over blocks, by the same in reverse order of blocks, by
    uniform ones, by their three largest and, with several runs of one arm, by those of the next
    run. Weights that depend on t are replaced by their mean over t. With --leave-one-out,
    figures/layers.png shows what each layer is worth beside the weight it has. Scores are kept:
    rerun the same command to resume.

    \b
    Example:
      semroute ablate studies/shapes/runs/depth/seed-* --out ablation \\
        --features world/features-test --samples world/shapes/test.parquet
    """
    import numpy as np
    from tqdm.auto import tqdm

    from ...pipeline.models.vae import open_decoder
    from ...schemas import Scoring
    from ...schemas.escaping import shown
    from ..runs.run import open_run
    from ..studies.ablation import TRAINED, WITHOUT, weights_of
    from ..studies.ablation import ablate as run_ablation
    from ..studies.figures import left_out_figure
    from ..studies.report import write_comparison
    from ..studies.results import ResultsTable
    from ..studies.runner import RESULTS
    from ..studies.statistics import ComparisonDesign

    scoring = Scoring(
        features=features,
        samples=samples,
        cfg_scales=list(cfg_scales),
        num_steps=num_steps,
        seed=seed,
    )
    trained = [open_run(run, None, "ema") for run in runs]
    table = ResultsTable(out / RESULTS, ("arm", "seed"))

    def report(line: str) -> None:
        tqdm.write(shown(line))

    results = run_ablation(
        trained, scoring, open_decoder, table, leave_one_out=leave_one_out, report=report
    )
    arms = list(dict.fromkeys(results["arm"].to_pylist()))
    references = dict.fromkeys(arms, TRAINED)
    design = ComparisonDesign(out.name, arms, references, scoring, len(runs), unit="runs")
    figures = {}
    left_out = {layer: WITHOUT.format(layer) for layer in trained[0].layers}
    if not {*left_out.values()}.isdisjoint(arms):
        weights = np.mean([weights_of(run, num_steps).numpy() for run in trained], 0)
        figures["layers"] = lambda table: left_out_figure(table, left_out, weights, design)
    for path in [out / RESULTS, *write_comparison(results, design, out, figures)]:
        echo(path)


@click.command()
@click.argument("run", type=LOCAL_PATH)
@click.option(
    "--features",
    required=True,
    help="Feature store of the captions to sample from.",
)
@click.option(
    "--num",
    default=200,
    show_default=True,
    type=click.IntRange(1),
    help="Number of captions, from the start of the store.",
)
@cfg_scales_option(1.0, 1.5, 3.0, 6.0)
@click.option(
    "--solver",
    "methods",
    multiple=True,
    default=("euler", "heun"),
    show_default=True,
    type=SOLVERS,
    help="May be given several times.",
)
@num_steps_option(least=2)
@seed_option
@batch_size_option
@clock_option
@dtype_option
def lag(
    run: Path,
    features: str,
    num: int,
    num_steps: int,
    clock: str,
    dtype: Any,
    seed: int,
    **how: Any,
) -> None:
    """Measure how noisy latents really are while a RUN samples, against the nominal noise level.

    The level is estimated from x_t alone, by an estimator that is calibrated on forward-noised
    latents. Writes RUN/lag.parquet and RUN/figures/lag.png.

    \b
    Example:
      semroute lag runs/time --features features-test --cfg-scale 1 --cfg-scale 6
    """
    from ..diffusion.sampling import SamplingConfig
    from ..evaluation.lag import report_lag
    from ..runs.run import open_run

    check_writable(run)
    trained = open_run(run, None, "ema")
    precision = trained.sampling_dtype(dtype)
    solver = SamplingConfig(num_steps, clock=trained.clock(clock), dtype=precision)
    for line in report_lag(trained, features, num, solver, seed=seed, **how):
        echo(line)
