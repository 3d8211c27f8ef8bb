"""The command line: the list of commands, and how their errors are shown."""

import errno
import traceback
from typing import Any

import click

from . import __version__
from .pipeline.commands import stores as pipeline
from .pipeline.commands.options import VERBOSITY, add_bounds, add_verbosity
from .pipeline.executor.base import DISK_FULL
from .pipeline.executor.threads import is_busy, wait_briefly
from .schemas import InputError
from .schemas.escaping import NOT_UTF8, shown
from .schemas.memory import is_out_of_memory
from .trainer.commands import embed, evaluate, runs, sample, stores, study, train

_REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Check who owns it, and what its mode allows."),
    errno.EROFS: "Name a place that can be written to.",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files, as by `ulimit -n 4096`."),
    errno.ENAMETOOLONG: "Name a shorter path.",
}
_OUTSIDE = (
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google"),
    *("httpx", "huggingface_hub", "obstore", "requests", "s3fs", "urllib3"),
    *("safetensors", "safetensors_rust"),
)
"""Packages whose own errors are of disks, networks, credentials and other people's files."""


_WORDS = "semroute.words"
"""Key of a context under which the words of the command line are."""


class _Commands(click.Group):
    """Commands that answer bad input, and errors of the operating system and of storage, with a
    message. Any other error is a bug of ours, and ends in a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = shown(error.message)  # type: ignore[misc]
            raise
        except InputError as error:
            if ctx.meta.get(VERBOSITY) == "verbose":
                traceback.print_exception(error)
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has gone
                raise
            raise click.ClickException(shown(_describe(error))) from error
        except Exception as error:
            named = next(filter(NOT_UTF8.search, ctx.meta[_WORDS]), None)
            if named is not None and "surrogates not allowed" in str(error):
                message = f"{named}: this name is not UTF-8, so it cannot be recorded; rename it"
                raise click.ClickException(shown(message)) from error
            if is_out_of_memory(error):
                raise click.ClickException(shown(_too_large(error))) from error
            if type(error).__module__.partition(".")[0] not in _OUTSIDE:
                raise
            raise click.ClickException(shown(f"{type(error).__name__}: {error}")) from error


def _too_large(error: Exception) -> str:
    """What to do about memory that did not suffice."""
    detail = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"memory does not suffice: {detail}. Use a machine or a device with more of it, or ask for "
        "less at once: a smaller network, batch, shard or number of workers."
    )


def _describe(error: OSError) -> str:
    """What an error of the operating system means, and what to do."""
    if error.errno in DISK_FULL:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}. Free some space and rerun the same command."
    if error.errno is None or not error.strerror:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    remedy = _REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + ("" if remedy is None else f". {remedy}")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="semroute")
def cli() -> None:
    """Cache every LLM layer once, then learn which layer each DiT block should read.

    \b
    captions --extract--> features --train--> run --sample, evaluate, plot
    images   --latents--> latents  ---^
    """
    if is_busy():
        wait_briefly()  # before any command imports torch


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
    cli.add_command(add_bounds(add_verbosity(command)))

if __name__ == "__main__":
    cli()
