"""``semroute evaluate``."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import click

from ...schemas import InputError
from .options import (
    clock_option,
    open_vae_decoder,
    refuse_options,
    sampling_options,
    take_solver,
    was_given,
)

F = TypeVar("F", bound=Callable[..., Any])
JUDGE_BATCH = 8
"""Pictures judged at once, where nobody chose."""
_JUDGE = (
    click.option(
        "--judge",
        help="A vision-language model of transformers: hub id or folder. The score is the "
        "probability that it says Yes.",
    ),
    click.option(
        "--question",
        help='Of --judge, with {} where the caption goes. Default: Does this figure show "{}"? '
        "Please answer Yes or No.",
    ),
    click.option(
        "--chance",
        is_flag=True,
        help="Of --judge: ask each picture for another caption too; twice the time.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Of --judge: folder of the results. Default: judged/JUDGE beside the pictures.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Of --judge: run the code that comes with the model.",
    ),
)
_JUDGE_ALONE = ("question", "chance", "out", "trust_remote_code")


def judge_options(command: F) -> F:
    """Options of a judge."""
    return functools.reduce(lambda found, option: option(found), _JUDGE[::-1], command)


def take_judge_options(how: dict[str, Any], judge: str | None) -> dict[str, Any]:
    """Take the options of a judge out of those of a command, and how many are judged at once.

    Raises:
        InputError: one was given, and no judge; or one that has no meaning where there is a judge.
    """
    taken = {name: how.pop(name) for name in _JUDGE_ALONE}
    if judge is None:
        refuse_options(_JUDGE_ALONE, "belongs to --judge")
        return taken
    allowed = {"run", "judge", "batch_size", *_JUDGE_ALONE}
    names = [name for name in click.get_current_context().params if name not in allowed]
    refuse_options(names, "has no meaning with --judge")
    size = how["batch_size"] if was_given("batch_size") else JUDGE_BATCH
    return taken | {"batch_size": size}


def judge_source(source: str, name: str, options: dict[str, Any]) -> None:
    """``semroute evaluate --judge``: ask a model what the pictures of a folder, run or table show.

    Args:
        source: a folder with ``captions.jsonl``; a run, of which that is ``samples``; or a table.
        name: of the judge.
        options: from :func:`take_judge_options`.
    """
    from ...pipeline.models.hub import find_model
    from ...pipeline.sources.table import read_samples
    from ...schemas import JudgeRecord
    from ..evaluation.image_set import find_shard
    from ..evaluation.vqascore import (
        ANSWERS_EXPECTED,
        FIGURE,
        JUDGEMENTS,
        QUESTION,
        SCORES,
        VQAScorer,
        default_dtype,
        score_images,
    )

    if find_shard(None)[1] > 1:
        raise InputError(
            "evaluate --judge runs in one process; start it without torchrun or accelerate launch"
        )
    question = options["question"] or QUESTION
    if question.count("{}") != 1:
        raise InputError(f"--question {question!r} must hold {{}} once, where the caption goes")
    table = _find_captions(source)
    samples = read_samples(table, need="image")
    if samples.text_column is None:
        raise InputError(f"{table} has no column of captions: text, prompt or caption")
    captions = samples.texts().to_pylist()
    several = next((row for row, found in enumerate(captions) if len(found) > 1), None)
    if several is not None:
        raise InputError(
            f"{table}: row {several} has {len(captions[several])} captions; expected one a picture"
        )
    model = find_model(name, "--judge", with_code=options["trust_remote_code"])
    record = JudgeRecord(
        judge=model.name, files=model.files, dtype=default_dtype(), question=question
    )
    short = PurePosixPath(name.partition("@")[0]).name
    out = options["out"] or Path(table).parent / "judged" / short
    try:
        verdict = score_images(
            lambda: VQAScorer(
                model.folder,
                name,
                record.dtype,
                trust_remote_code=options["trust_remote_code"],
            ),
            samples.image_files(),
            [found[0] for found in captions],
            _groups(table, len(samples)),
            out,
            record,
            batch_size=options["batch_size"],
            chance=options["chance"],
        )
    except KeyboardInterrupt:
        click.echo("Stopped. Run the same command to continue.", err=True)
        sys.exit(130)
    click.echo(verdict)
    for file in (JUDGEMENTS, SCORES, FIGURE):
        click.echo(out / file)
    if verdict.answered < ANSWERS_EXPECTED:
        click.echo(
            f"warning: {name} says Yes or No with a probability of {verdict.answered:.2f} only: it "
            "answers otherwise, and these scores mean little. Ask in its words with --question.",
            err=True,
        )
    if verdict.unreadable:
        listed = "\n  ".join(verdict.unreadable[:20])
        raise InputError(
            f"{len(verdict.unreadable)} of {len(samples)} pictures could not be judged:\n  {listed}"
        )


def _find_captions(source: str) -> str:
    """The table of captions and images of a run, of a folder of pictures, or itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    if (folder / "run.json").exists():
        folder = folder / "samples"
    return str(folder / "captions.jsonl")


def _groups(table: str, num: int) -> list[str | None]:
    """Of a table of pictures, what each is summarised under, where it says."""
    from ...pipeline.sources.table import TAR, column_names, read_table

    if table.endswith(TAR) or "group" not in column_names(table):
        return [None] * num
    _, found = read_table(table, columns=["group"])
    return [None if value is None else str(value) for value in found["group"].to_pylist()]


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
    from ...pipeline.store.open import open_features
    from ..evaluation.shapes import score_run
    from ..runs.run import open_run

    trained = open_run(Path(run), step, weights)
    store = open_features(features)
    trained.check_features(store.manifest.identity)
    solver = take_solver(trained, how)
    decode = open_vae_decoder(trained)
    for path in score_run(trained, store, samples, decode, solver, report=click.echo, **how):
        click.echo(path)
