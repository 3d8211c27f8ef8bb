"""The parts of ``sample`` and ``evaluate`` that have to do with benchmarks: files of prompts drawn,
pictures judged. Like the commands they use both halves; imports stay inside."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, get_args

import click
from click.core import ParameterSource

from ..schemas import InputError, LayoutName

F = TypeVar("F", bound=Callable[..., Any])
JUDGE_BATCH = 8
"""Pictures judged at once, where nobody chose."""

_PROMPTS = (
    click.option(
        "--prompts",
        "file",
        help="A benchmark's file of prompts. The run's LLM is loaded, or give --features that "
        "were extracted from it.",
    ),
    click.option(
        "--layout",
        type=click.Choice(get_args(LayoutName)),
        help="Of --prompts: whose scorer the folder is for. Default: plain.",
    ),
    click.option(
        "--images-per-prompt",
        type=click.IntRange(1),
        help="Of --prompts. Default: as many as the benchmark has; 4 for geneval, 10 for "
        "t2i-compbench, otherwise 1.",
    ),
    click.option("--text-column", help="Of --prompts. Default: prompt, prompts, text or caption."),
    click.option(
        "--shard",
        metavar="I/N",
        help="Of --prompts: only part I of N, from 0. Default: the process's own under torchrun "
        "or accelerate launch, otherwise all.",
    ),
)
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
_PROMPTS_ALONE = ("layout", "images_per_prompt", "text_column", "shard")
_JUDGE_ALONE = ("question", "chance", "out", "trust_remote_code")


def prompts_options(command: F) -> F:
    """Options of a file of prompts."""
    return functools.reduce(lambda found, option: option(found), _PROMPTS[::-1], command)


def judge_options(command: F) -> F:
    """Options of a judge."""
    return functools.reduce(lambda found, option: option(found), _JUDGE[::-1], command)


def take_prompts_options(how: dict[str, Any], file: str | None) -> dict[str, Any]:
    """Take the options of a file of prompts out of those of a command.

    Raises:
        InputError: one was given, and no file.
    """
    if file is None:
        _refuse(_PROMPTS_ALONE, "belongs to --prompts FILE")
    return {name: how.pop(name) for name in _PROMPTS_ALONE}


def take_judge_options(how: dict[str, Any], judge: str | None) -> dict[str, Any]:
    """Take the options of a judge out of those of a command, and how many are judged at once.

    Raises:
        InputError: one was given, and no judge; or one that has no meaning where there is a judge.
    """
    taken = {name: how.pop(name) for name in _JUDGE_ALONE}
    if judge is None:
        _refuse(_JUDGE_ALONE, "belongs to --judge")
        return taken
    allowed = {"run", "judge", "batch_size", *_JUDGE_ALONE}
    names = [name for name in click.get_current_context().params if name not in allowed]
    _refuse(names, "has no meaning with --judge")
    size = how["batch_size"] if _was_given("batch_size") else JUDGE_BATCH
    return taken | {"batch_size": size}


def draw_file(
    run: Any,
    file: str,
    num: int | None,
    features: str | None,
    model: str | None,
    decode: Callable[[Any], Any],
    out: Path,
    options: dict[str, Any],
    how: Any,
    said: dict[str, Any],
    **drawing: Any,
) -> None:
    """``semroute sample --prompts``: the pictures of a file that are not there yet.

    Args:
        run: from :func:`semroute.trainer.results.open_run`.
        num: only the first prompts.
        features: extracted from the file; None: the LLM encodes the prompts.
        model: where it is; default: where it was.
        options: from :func:`take_prompts_options`.
        how, said: the solver, and what was said of it.
        drawing: of :func:`semroute.trainer.gallery.draw_gallery`.
    """
    from ..pipeline.prompts import read_prompts
    from .gallery import draw_gallery, find_shard, finish_gallery, open_gallery
    from .layouts import LAYOUTS

    shard = find_shard(options["shard"])
    layout: LayoutName = options["layout"] or "plain"
    prompts = read_prompts(file, options["text_column"])[:num]
    source, ids = conditions(run, [prompt.text for prompt in prompts], features, file, model)
    gallery = open_gallery(
        out,
        prompts,
        run,
        layout=layout,
        num_images=options["images_per_prompt"] or LAYOUTS[layout].num_images,
        codec="none" if features is None else source.manifest.codec.name,
        sampling=said,
    )
    drawn = draw_gallery(gallery, run, source, ids, decode, how, shard=shard, **drawing)
    missing = len(gallery.missing())
    click.echo(
        f"{gallery.out}: {drawn:,} pictures drawn, {len(gallery) - missing:,} of "
        f"{len(gallery):,} are there"
    )
    if not missing:
        click.echo(finish_gallery(gallery))


def conditions(
    run: Any, texts: list[str], features: str | None, file: str | None, model: str | None
) -> tuple[Any, list[int]]:
    """Where the hidden states of prompts come from, and which entry each is.

    Raises:
        InputError: the features are not those of the file, or not the run's.
    """
    if features is None:
        from ..pipeline.extraction import encode_prompts

        device = str(next(run.model.parameters()).device)
        source = model or run.record.model_source
        encoded = encode_prompts(texts, run.record.features, source, device)
        return encoded, list(range(1, len(texts) + 1))
    from ..pipeline.store import open_features

    store = open_features(features)
    run.check_features(store.manifest.identity)
    ids = [row[0] for row in store.samples.slice(0, len(texts))["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != texts:
        raise InputError(
            f"{features} was not extracted from {file}: the prompts differ. Run semroute extract "
            f"{file}, or leave --features out to have the LLM encode them."
        )
    return store, ids


def judge_source(source: str, name: str, options: dict[str, Any]) -> None:
    """``semroute evaluate --judge``: ask a model what the pictures of a folder, run or table show.

    Args:
        source: a folder with ``captions.jsonl``; a run, of which that is ``samples``; or a table.
        name: of the judge.
        options: from :func:`take_judge_options`.
    """
    from ..pipeline.encoder import find_model
    from ..pipeline.samples import read_samples
    from ..schemas import JudgeRecord
    from .gallery import find_shard
    from .judging import (
        ANSWERS_EXPECTED,
        FIGURE,
        JUDGEMENTS,
        QUESTION,
        SCORES,
        Judge,
        default_dtype,
        judge_pictures,
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
        verdict = judge_pictures(
            lambda: Judge(
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
    from ..pipeline.samples import TAR, column_names, read_table

    if table.endswith(TAR) or "group" not in column_names(table):
        return [None] * num
    _, found = read_table(table, columns=["group"])
    return [None if value is None else str(value) for value in found["group"].to_pylist()]


def _refuse(names: Any, why: str) -> None:
    for parameter in click.get_current_context().command.params:
        if parameter.name in names and _was_given(parameter.name):
            raise InputError(f"{parameter.opts[0]} {why}")


def _was_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT)
