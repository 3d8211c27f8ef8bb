"""``semroute sample``: images of stored captions, of new prompts or of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ...pipeline.commands.options import FINITE_FLOAT, LOCAL_PATH, echo, options, report_line
from ...schemas import BenchmarkName, InputError, check_writable
from .options import open_vae_decoder, pop_sampling_config, refuse_options, sampling_options

if TYPE_CHECKING:
    from ..diffusion.sampling import SamplingConfig
    from ..evaluation.generate import CaptionSet
    from ..runs.run import Run

NUM_CAPTIONS = 18
"""Captions taken from a feature store, unless ``--num`` is given."""
prompts_options = options(
    click.option(
        "--prompts",
        "file",
        help="File of prompts of a benchmark. Loads the run's LLM, unless --features extracted "
        "from this file are given.",
    ),
    click.option(
        "--layout",
        type=click.Choice(get_args(BenchmarkName)),
        help="With --prompts: the scorer that the folder is laid out for. Default: plain.",
    ),
    click.option(
        "--images-per-prompt",
        type=click.IntRange(1),
        help="With --prompts. Default: 4 for geneval, 10 for t2i-compbench, otherwise 1.",
    ),
    click.option(
        "--text-column",
        help="With --prompts: column of prompts. Default: prompt, prompts, text or caption.",
    ),
    click.option(
        "--shard",
        metavar="I/N",
        help="With --prompts: generate only part I of N, counted from 0. Default: the process's "
        "own part under torchrun or accelerate launch, otherwise all.",
    ),
)
PROMPTS_ONLY = ("layout", "images_per_prompt", "text_column", "shard")
"""Parameters that need ``--prompts``."""


@click.command()
@click.argument("run", type=LOCAL_PATH)
@click.option("--features", help="Take captions from this feature store; no LLM is needed.")
@click.option(
    "--num",
    type=click.IntRange(1),
    help="Use only this many captions, from the start. Default: 18 of a store, all of --prompts.",
)
@click.option(
    "--prompt",
    "texts",
    multiple=True,
    help="A new prompt; may be given several times. Loads the run's LLM to encode it.",
)
@prompts_options
@click.option(
    "--model",
    help="Where that LLM is now. Default: where it was when the features were extracted.",
)
@click.option(
    "--vae",
    help="Where the VAE of the latents is now. Default: where it was when they were made.",
)
@click.option(
    "--cfg-scale",
    default=6.0,
    show_default=True,
    type=FINITE_FLOAT,
    help="Guidance scale; 1 means none.",
)
@click.option(
    "--size",
    metavar="HEIGHTxWIDTH",
    help="In pixels, one of the buckets that the run was trained on. Default: the first.",
)
@click.option(
    "--out",
    type=LOCAL_PATH,
    help="Folder of the images. Default: RUN/samples, or RUN/pictures/FILE for --prompts FILE.",
)
@sampling_options
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
    **sampling: Any,
) -> None:
    """Generate images with a trained RUN, from stored captions or new prompts.

    If the VAE of its latents cannot be found, the latents are written instead.

    With --prompts, the images of a benchmark are laid out for its own scorer. Rerun the same
    command to resume; several processes may generate a shard each.

    \b
    Examples:
      semroute sample runs/depth --features features-test --cfg-scale 3
      semroute sample runs/depth --prompt "two red circles"
      semroute sample runs/depth --prompts evaluation_metadata.jsonl --layout geneval
    """
    if bool(texts) + (file is not None or features is not None) != 1:
        raise InputError("give either --features, --prompt or --prompts")
    benchmark = {name: sampling.pop(name) for name in PROMPTS_ONLY}
    if file is None:
        refuse_options(PROMPTS_ONLY, "needs --prompts FILE")
    if features is not None:
        refuse_options(["model"], "is not used with --features, which no LLM encodes: leave it out")
    generator = open_generator(run, step, weights, size, sampling)
    if file is not None:
        out = out or run / "pictures" / Path(file).stem
        sample_file(generator, file, num, features, model, vae, out, **benchmark)
        return
    from ..evaluation.generate import encoded_captions, open_encoder, stored_captions

    if features is not None:
        captions = stored_captions(generator.run, features, num or NUM_CAPTIONS)
    else:
        encoder = open_encoder(generator.run, model)
        captions = encoded_captions(encoder, texts[:num], generator.run)
    sample_captions(generator, captions, vae, out or run / "samples")


@dataclass(frozen=True)
class Generator:
    """A run, and how to sample from it.

    Attributes:
        run: at one checkpoint.
        config: of the solver.
        settings: what the user asked for, as image sets record it.
        sampling: seed, batch size and, if it is not the default, shape of the latents.
    """

    run: Run
    config: SamplingConfig
    settings: Mapping[str, Any]
    sampling: Mapping[str, Any]


def open_generator(
    path: Path, step: int | None, weights: Any, size: str | None, options: Mapping[str, Any]
) -> Generator:
    """Open a run with the values of :data:`sampling_options`."""
    from ..runs.run import open_run

    run = open_run(path, step, weights)
    left_out = ("batch_size", "dtype")
    settings = {name: value for name, value in options.items() if name not in left_out}
    sampling = {**options}
    config = pop_sampling_config(run, sampling)
    if config.dtype != "float32":  # as image sets record it since there is a choice
        settings["dtype"] = config.dtype
    if size is not None:
        sampling["shape"], settings["size"] = run.latent_shape(size), size
    return Generator(run, config, settings, sampling)


def sample_captions(generator: Generator, captions: CaptionSet, vae: str | None, out: Path) -> None:
    """Generate an image of each caption, or its latent if there is no VAE to decode it."""
    from ..evaluation.generate import generate_samples

    check_writable(out)
    decode = None
    try:
        decode = open_vae_decoder(generator.run, vae)
    except InputError as error:
        if vae is not None:
            raise
        report_line(f"{error}\nLatents are written instead of images. Name the VAE with --vae.")
    for path in generate_samples(
        generator.run, captions, decode, out, generator.config, **generator.sampling
    ):
        echo(path)


def sample_file(
    generator: Generator,
    file: str,
    num: int | None,
    features: str | None,
    model: str | None,
    vae: str | None,
    out: Path,
    *,
    layout: BenchmarkName | None,
    images_per_prompt: int | None,
    text_column: str | None,
    shard: str | None,
) -> None:
    """``semroute sample --prompts``: generate the missing images of a file of prompts.

    The arguments are the command's options.
    """
    from ...pipeline.sources.prompts import read_prompts
    from ..evaluation.benchmarks import BENCHMARK_FORMATS
    from ..evaluation.generate import captions_of_file, encoded_captions, open_encoder
    from ..evaluation.image_set import (
        find_shard,
        finish_image_set,
        generate_image_set,
        open_image_set,
    )

    check_writable(out)
    run, layout, own_shard = generator.run, layout or "plain", find_shard(shard)
    decode = open_vae_decoder(run, vae)
    prompts = read_prompts(file, text_column)[:num]
    texts = [prompt.text for prompt in prompts]
    if features is None:
        captions = encoded_captions(open_encoder(run, model), texts, run)
    else:
        captions = captions_of_file(
            run,
            features,
            file,
            texts,
            first_rows=True,
            remedy=f"Run semroute extract {file}, or leave out --features to have the LLM encode "
            "the prompts.",
        )
    images = open_image_set(
        out,
        prompts,
        run,
        layout=layout,
        num_images=images_per_prompt or BENCHMARK_FORMATS[layout].num_images,
        codec=captions.codec,
        sampling=generator.settings,
    )
    num_new = generate_image_set(
        images,
        run,
        captions,
        decode,
        generator.config,
        shard=own_shard,
        **generator.sampling,
    )
    num_missing = len(images.missing())
    echo(
        f"{images.out}: {num_new:,} images generated, {len(images) - num_missing:,} of "
        f"{len(images):,} complete"
    )
    if not num_missing:
        echo(finish_image_set(images))
