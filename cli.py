"""The command line: the list of commands, and how their errors are shown."""

import traceback
from typing import Any

import click

from . import __version__
from .pipeline import commands as pipeline
from .pipeline.executor.base import DISK_FULL
from .schemas import InputError
from .trainer.commands import embed, evaluate, runs, sample, stores, study, train


class _Commands(click.Group):
    """Commands that answer bad input and a full disk with a message instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            if ctx.meta.get(pipeline.VERBOSITY) == "verbose":
                traceback.print_exception(error)
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = f" while writing {error.filename}" if error.filename else ""
            raise click.ClickException(
                f"the disk is full{where}. Free some space and rerun the same command."
            ) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="semroute")
def cli() -> None:
    """Cache every LLM layer once, then learn which layer each DiT block should read.

    \b
    captions --extract--> features --train--> run --sample, evaluate, plot
    images   --latents--> latents  ---^
    """


for command in (
    train.shapes,
    pipeline.extract,
    pipeline.estimate,
    pipeline.latents,
    pipeline.conditioning,
    pipeline.status,
    pipeline.inspect,
    stores.probe,
    pipeline.verify,
    stores.rewrite,
    pipeline.push,
    train.train,
    sample.sample,
    evaluate.evaluate,
    runs.plot,
    runs.compare,
    runs.export,
    embed.embed,
    study.study,
    study.ablate,
    study.lag,
):
    cli.add_command(pipeline.add_verbosity(command))

if __name__ == "__main__":
    cli()
