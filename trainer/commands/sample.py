"""``semroute sample``."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from ...schemas import BenchmarkName, InputError
from .evaluate import F
from .options import clock_option, open_vae_decoder, refuse_options, sampling_options, take_solver

_PROMPTS = (
    click.option(
        "--prompts",
        "file",
        help="A benchmark's file of prompts. The run's LLM is loaded, or give --features that "
        "were extracted from it.",
    ),
    click.option(
        "--layout",
        type=click.Choice(get_args(BenchmarkName)),
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
_PROMPTS_ALONE = ("layout", "images_per_prompt", "text_column", "shard")


def prompts_options(command: F) -> F:
    """Options of a file of prompts."""
    return functools.reduce(lambda found, option: option(found), _PROMPTS[::-1], command)


def take_prompts_options(how: dict[str, Any], file: str | None) -> dict[str, Any]:
    """Take the options of a file of prompts out of those of a command.

    Raises:
        InputError: one was given, and no file.
    """
    if file is None:
        refuse_options(_PROMPTS_ALONE, "belongs to --prompts FILE")
    return {name: how.pop(name) for name in _PROMPTS_ALONE}


def generate_file(
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
        run: from :func:`semroute.trainer.runs.run.open_run`.
        num: only the first prompts.
        features: extracted from the file; None: the LLM encodes the prompts.
        model: where it is; default: where it was.
        options: from :func:`take_prompts_options`.
        how, said: the solver, and what was said of it.
        drawing: of :func:`semroute.trainer.evaluation.image_set.generate_image_set`.
    """
    from ...pipeline.sources.prompts import read_prompts
    from ..evaluation.benchmarks import BENCHMARK_FORMATS
    from ..evaluation.image_set import (
        find_shard,
        finish_image_set,
        generate_image_set,
        open_image_set,
    )

    shard = find_shard(options["shard"])
    layout: BenchmarkName = options["layout"] or "plain"
    prompts = read_prompts(file, options["text_column"])[:num]
    source, ids = conditions(run, [prompt.text for prompt in prompts], features, file, model)
    gallery = open_image_set(
        out,
        prompts,
        run,
        layout=layout,
        num_images=options["images_per_prompt"] or BENCHMARK_FORMATS[layout].num_images,
        codec="none" if features is None else source.manifest.codec.name,
        sampling=said,
    )
    drawn = generate_image_set(gallery, run, source, ids, decode, how, shard=shard, **drawing)
    missing = len(gallery.missing())
    click.echo(
        f"{gallery.out}: {drawn:,} pictures drawn, {len(gallery) - missing:,} of "
        f"{len(gallery):,} are there"
    )
    if not missing:
        click.echo(finish_image_set(gallery))


def conditions(
    run: Any, texts: list[str], features: str | None, file: str | None, model: str | None
) -> tuple[Any, list[int]]:
    """Where the hidden states of prompts come from, and which entry each is.

    Raises:
        InputError: the features are not those of the file, or not the run's.
    """
    if features is None:
        from ...pipeline.extraction.prompts import encode_prompts

        device = str(next(run.model.parameters()).device)
        source = model or run.record.model_source
        encoded = encode_prompts(texts, run.record.features, source, device)
        return encoded, list(range(1, len(texts) + 1))
    from ...pipeline.store.open import open_features

    store = open_features(features)
    run.check_features(store.manifest.identity)
    ids = [row[0] for row in store.samples.slice(0, len(texts))["caption_ids"].to_pylist()]
    if store.captions["text"].take(ids).to_pylist() != texts:
        raise InputError(
            f"{features} was not extracted from {file}: the prompts differ. Run semroute extract "
            f"{file}, or leave --features out to have the LLM encode them."
        )
    return store, ids


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--features", help="Take captions from this feature store; no LLM is needed.")
@click.option(
    "--num",
    type=click.IntRange(1),
    help="Captions to take, the first ones. Default: 18 of a store, all of --prompts.",
)
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="A new prompt; may be given several times. The run's LLM is loaded to encode it.",
)
@prompts_options
@click.option(
    "--model", help="Where that LLM is now. Default: where it was when the features were extracted."
)
@click.option(
    "--vae", help="Where the VAE of its latents is now. Default: where it was when they were made."
)
@click.option("--cfg-scale", default=6.0, show_default=True, help="Guidance; 1 is none.")
@click.option(
    "--size",
    metavar="HEIGHTxWIDTH",
    help="In pixels, one of the buckets that were trained on. Default: the first of them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the pictures. Default: RUN/samples, or RUN/pictures/FILE of --prompts FILE.",
)
@sampling_options
@clock_option
def sample(
    run: Path,
    features: str | None,
    num: int | None,
    texts: tuple[str, ...],
    file: str | None,
    model: str | None,
    vae: str | None,
    size: str | None,
    out: Path | None,
    weights: Any,
    step: int | None,
    **how: Any,
) -> None:
    """Draw pictures with a trained RUN, from stored captions or new prompts.

    Where the VAE of its latents is not to be had, latents are written instead.

    With --prompts, pictures of a benchmark are laid out for its own scorer. The same command
    continues what was stopped; several processes may draw a shard each.

    \b
    Examples:
      semroute sample runs/depth --features features-test --cfg-scale 3
      semroute sample runs/depth --prompt "two red circles"
      semroute sample runs/depth --prompts evaluation_metadata.jsonl --layout geneval
    """
    if bool(texts) + (file is not None or features is not None) != 1:
        raise InputError("give either --features, --prompt or --prompts")
    benchmark = take_prompts_options(how, file)
    from ..evaluation.generate import generate_samples
    from ..runs.run import open_run

    trained = open_run(run, step, weights)
    said = {key: value for key, value in how.items() if key != "batch_size"}
    solver = take_solver(trained, how)
    if size is not None:
        how["shape"], said["size"] = trained.latent_shape(size), size
    if file is not None:
        out = out or run / "pictures" / Path(file).stem
        decode = open_vae_decoder(trained, vae)
        generate_file(
            trained, file, num, features, model, decode, out, benchmark, solver, said, **how
        )
        return
    if features is not None:
        from ...pipeline.store.open import open_features

        store = open_features(features)
        trained.check_features(store.manifest.identity)
        rows = store.samples.slice(0, num or 18)["caption_ids"].to_pylist()
        ids = [row[0] for row in rows]
        wanted = store.captions["text"].take(ids).to_pylist()
        source = store
    else:
        wanted = list(texts[:num])
        source, ids = conditions(trained, wanted, None, None, model)
    decoder = None
    try:
        decoder = open_vae_decoder(trained, vae)
    except InputError as error:
        if vae is not None:
            raise
        click.echo(f"{error}\nSo latents are written, not pictures. Name it with --vae.", err=True)
    folder = out or run / "samples"
    for path in generate_samples(trained, source, ids, wanted, decoder, folder, solver, **how):
        click.echo(path)
