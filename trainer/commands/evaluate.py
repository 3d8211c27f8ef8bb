"""``semroute evaluate``: scores on the world of shapes, or by a vision-language model."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal

import click

from ...pipeline.commands.options import LOCAL_PATH, echo, interruptible, options, suggest
from ...schemas import InputError, check_writable
from .options import (
    STOPPED,
    cfg_scales_option,
    open_vae_decoder,
    refuse_options,
    refuse_unguided_interval,
    sampling_options,
    scoring_options,
    was_given,
)

JUDGE_BATCH_SIZE = 8
"""Images that a judge sees at once, unless ``--batch-size`` is given."""
judge_options = options(
    click.option(
        "--judge",
        help="Vision-language model of transformers: a Hub id or a folder. The score of an image "
        "is the probability that it answers Yes.",
    ),
    click.option(
        "--question",
        help="With --judge: what to ask, with {} for the caption. Default: Does this figure show "
        '"{}"? Please answer Yes or No.',
    ),
    click.option(
        "--chance",
        is_flag=True,
        help="With --judge: also ask about another caption for each image; takes twice as long.",
    ),
    click.option(
        "--out",
        type=LOCAL_PATH,
        help="With --judge: folder of the results. Default: judged/JUDGE beside the images.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="With --judge: run the code that comes with the model.",
    ),
)
JUDGE_ONLY = ("question", "chance", "out", "trust_remote_code")
"""Parameters that need ``--judge``."""
WITH_JUDGE = ("run", "judge", "batch_size", "dtype", *JUDGE_ONLY)
"""Parameters that may be given together with ``--judge``."""


@click.command()
@click.argument("run", metavar="RUN")
@scoring_options(required=False)
@judge_options
@cfg_scales_option(1.0, 3.0)
@click.option(
    "--images-per-caption",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Images per caption, each from different noise.",
)
@sampling_options
def evaluate(
    run: str,
    features: str | None,
    samples: str | None,
    judge: str | None,
    question: str | None,
    chance: bool,
    out: Path | None,
    trust_remote_code: bool,
    weights: Any,
    step: int | None,
    **sampling: Any,
) -> None:
    """Score a RUN on the captions of a shapes world, skill by skill and against chance.

    Writes RUN/evaluation.json, and some of the scored images into RUN/figures.

    With --judge, a vision-language model is asked whether each image shows its caption. RUN is then
    a folder of images written by semroute sample, a run (for its RUN/samples), or a table of
    captions and images. Rerun the same command to resume.

    \b
    Examples:
      semroute evaluate runs/depth --features features-test --samples shapes/test.parquet
      semroute evaluate geneval --judge Qwen/Qwen2.5-VL-7B-Instruct
    """
    if judge is not None:
        others = {*click.get_current_context().params} - {*WITH_JUDGE}
        refuse_options(others, "cannot be combined with --judge")
        size = sampling["batch_size"] if was_given("batch_size") else JUDGE_BATCH_SIZE
        score_with_judge(
            run,
            judge,
            question=question,
            chance=chance,
            out=out,
            trust_remote_code=trust_remote_code,
            batch_size=size,
            dtype=sampling["dtype"],
        )
        return
    refuse_options(JUDGE_ONLY, "needs --judge")
    LOCAL_PATH.convert(run, None, click.get_current_context())
    if features is None or samples is None:
        raise InputError("give --judge, or --features and --samples")
    from ...schemas import Scoring
    from ..evaluation.shapes import score_run
    from ..runs.run import open_run

    refuse_unguided_interval(sampling["cfg_scales"])
    batch_size = sampling.pop("batch_size")
    sampling |= {"cfg_scales": [*sampling["cfg_scales"]], "solver": sampling.pop("method")}
    scoring = Scoring(features=features, samples=samples, **sampling)
    check_writable(Path(run))
    trained = open_run(Path(run), step, weights)
    decode = open_vae_decoder(trained)
    for path in score_run(trained, scoring, decode, batch_size=batch_size, report=echo):
        echo(path)
    suggest("plot", run)


def score_with_judge(
    source: str,
    judge: str,
    *,
    question: str | None,
    chance: bool,
    out: Path | None,
    trust_remote_code: bool,
    batch_size: int,
    dtype: Literal["auto", "float32", "bfloat16"],
) -> None:
    """``semroute evaluate --judge``: ask a model what the images of a folder, run or table show.

    Args:
        source: a folder with ``captions.jsonl``; a run, whose ``samples`` is that folder; or a
            table of captions and images.
    """
    from ...pipeline.models.hub import find_model
    from ...schemas import JudgeRecord
    from ..evaluation.image_set import find_shard
    from ..evaluation.vqascore import (
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
    question = question or QUESTION
    if question.count("{}") != 1:
        raise InputError(f"--question {question!r} must contain {{}} once, in place of the caption")
    table = find_captions(source)
    images, captions = read_images(table)
    model = find_model(judge, "--judge", with_code=trust_remote_code)
    record = JudgeRecord(
        judge=model.name,
        files=model.files,
        dtype=default_dtype() if dtype == "auto" else dtype,
        question=question,
    )
    out = out or Path(table).parent / "judged" / PurePosixPath(judge.partition("@")[0]).name
    with interruptible(KeyboardInterrupt, STOPPED):
        scores = score_images(
            lambda: VQAScorer(
                model.folder, judge, record.dtype, trust_remote_code=trust_remote_code
            ),
            images.image_files(),
            captions,
            read_groups(table, len(images)),
            out,
            record,
            batch_size=batch_size,
            chance=chance,
        )
    echo(scores)
    for file in (JUDGEMENTS, SCORES, FIGURE):
        echo(out / file)
    report_unanswered(scores, judge, len(images))


def find_captions(source: str) -> str:
    """The table of captions and images of a run or of a folder of images; a table as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    if (folder / "run.json").exists():
        folder = folder / "samples"
    return str(folder / "captions.jsonl")


def read_images(table: str) -> tuple[Any, list[str]]:
    """A :class:`semroute.pipeline.sources.table.SampleTable` of images, and each one's caption.

    Raises:
        InputError: no captions, or several for one image.
    """
    from ...pipeline.sources.table import read_samples

    samples = read_samples(table, need="image")
    if samples.text_column is None:
        raise InputError(f"{table} has no column of captions: text, prompt or caption")
    captions = samples.texts().to_pylist()
    for row, texts in enumerate(captions):
        if len(texts) > 1:
            raise InputError(
                f"{table}: row {row} has {len(texts)} captions; expected one per image"
            )
    return samples, [text for (text,) in captions]


def read_groups(table: str, num_images: int) -> list[str | None]:
    """The group under which each image of a table is summarised, if it names one."""
    from ...pipeline.sources.places import SUFFIXES, TAR
    from ...pipeline.sources.table import column_names, read_table
    from ...schemas.urls import suffix_of

    if suffix_of(table, SUFFIXES) == TAR or "group" not in column_names(table):
        return [None] * num_images
    _, rows = read_table(table, columns=["group"])
    return [None if group is None else str(group) for group in rows["group"].to_pylist()]


def report_unanswered(scores: Any, judge: str, num_images: int) -> None:
    """Warn of a judge that answers neither Yes nor No, and of images that it did not see.

    Args:
        scores: :class:`semroute.trainer.evaluation.vqascore.VQAScores`.

    Raises:
        InputError: images could not be scored.
    """
    from ..evaluation.vqascore import ANSWERS_EXPECTED

    if scores.answered < ANSWERS_EXPECTED:
        echo(
            f"warning: {judge} says Yes or No with a probability of {scores.answered:.2f} only, so "
            "these scores mean little. Ask in words that it knows, with --question.",
            err=True,
        )
    if scores.unreadable:
        listed = "\n  ".join(scores.unreadable[:20])
        raise InputError(
            f"{len(scores.unreadable)} of {num_images} images could not be scored:\n  {listed}"
        )
