"""``semroute embed``: prompts encoded for a pipeline of diffusers, with what a run learned."""

from pathlib import Path
from typing import Any

import click

from ...pipeline.commands.options import LOCAL_PATH, echo, report_line
from ...schemas import check_writable
from .options import step_option, weights_option


@click.command()
@click.argument("run", type=LOCAL_PATH)
@click.argument("prompts")
@click.argument("out", type=LOCAL_PATH)
@click.option(
    "--negative", metavar="TEXT", help="Negative prompt. Default: the empty one, if it takes one."
)
@click.option(
    "--pipeline",
    help="Where the run's pipeline is now. Default: where it was when the run was trained.",
)
@click.option(
    "--text-column",
    help="Column of prompts. Default: prompt, prompts, text or caption.",
)
@step_option
@weights_option
def embed(
    run: Path,
    prompts: str,
    out: Path,
    negative: str | None,
    pipeline: str | None,
    text_column: str | None,
    step: int | None,
    weights: Any,
) -> None:
    """Encode PROMPTS for the diffusers pipeline of a RUN, into the file OUT.

    RUN may also be a pipeline, a folder or a hub id, whose prompts are encoded as they are.

    The text encoders of the pipeline are loaded, but not its transformer. Tensors in OUT, a
    .safetensors file, are named as the pipeline's arguments, so it samples where no LLM fits.
    Where the run adds to the pipeline's input, they hold what it learned; where it adds in each
    block, semroute.attach(pipe, RUN, embeds=OUT) does.

    \b
    Example:
      semroute embed runs/krea2 prompts.txt embeds.safetensors --negative "blurry"
      semroute embed Lightricks/LTX-2 prompts.txt embeds.safetensors
    """
    from ...pipeline.sources.prompts import read_prompts
    from ..evaluation.embed import embed as run_embed

    check_writable(out)
    texts = [prompt.text for prompt in read_prompts(prompts, text_column)]
    embeds = run_embed(
        run,
        texts,
        out,
        negative=negative,
        pipeline=pipeline,
        step=step,
        weights=weights,
    )
    echo(out)
    if embeds.usage:
        report_line(embeds.usage)
