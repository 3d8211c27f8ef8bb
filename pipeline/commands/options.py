"""What commands share: options, types of values, and how they print."""

import functools
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from ...schemas import DEFAULT_RANK, MAX_QUALITY, MAX_SEED, MIN_QUALITY, CodecName, InputError
from ...schemas.contract import MAX_NUMBER
from ...schemas.escaping import shown
from ...schemas.units import parse_bytes
from ...schemas.verbosity import Level, speaking, speaks
from ..executor.base import Interrupted

if TYPE_CHECKING:
    pass

VERBOSITY = "semroute.verbosity"
"""Key of a context under which the level is that the user asked for."""
F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator; ``--help`` lists them in this order."""
    return lambda command: functools.reduce(lambda f, add: add(f), reversed(decorators), command)


@contextmanager
def interruptible(
    interrupt: type[BaseException] = Interrupted, message: str | None = None
) -> Iterator[None]:
    """Exit with code 130 when a command that can be resumed is stopped. Also a decorator.

    Args:
        interrupt: what stops it.
        message: printed to standard error.
    """
    try:
        yield
    except interrupt:
        if message is not None:
            report_line(message)
        sys.exit(130)


def echo(text: object, err: bool = False) -> None:
    """Print a line, which may hold texts of a stranger's store, and URLs.

    Args:
        err: to standard error.
    """
    click.echo(shown(text), err=err)


def report_line(line: str) -> None:
    """Print to standard error: standard output is for results.

    With ``--quiet`` only warnings, with ``--verbose`` the time too.
    """
    level = speaks()
    if level == "quiet" and not line.startswith("warning"):
        return
    echo(f"{datetime.now():%H:%M:%S} {line}" if level == "verbose" else line, err=True)


def suggest(*command: object) -> None:
    """Name the command that one would type next; capitals are for the user to fill in."""
    report_line(f"next: semroute {shlex.join(map(str, command))}")


def add_verbosity(command: click.Command) -> click.Command:
    """The command with ``--quiet`` and ``--verbose``."""
    command.params += [
        click.Option(
            ["-q", "--quiet", "verbosity"],
            flag_value="quiet",
            default="normal",
            expose_value=False,
            callback=_speak,
            help="Print only results, warnings and errors.",
        ),
        click.Option(
            ["-v", "--verbose", "verbosity"],
            flag_value="verbose",
            expose_value=False,
            callback=_speak,
            help="Also print the time of each line, progress every 5 seconds, and the traceback of "
            "an error.",
        ),
    ]
    run = command.callback
    assert run is not None

    @functools.wraps(run)
    def run_speaking(*arguments: Any, **options: Any) -> Any:
        # Not while options are parsed: a context whose parsing fails is never closed.
        with speaking(click.get_current_context().meta.get(VERBOSITY, "normal")):
            return run(*arguments, **options)

    command.callback = run_speaking
    return command


_MAY_BE_EMPTY = {"prompt", "negative"}
"""Options whose text means something if it is empty: the null caption."""
_MAX_ROWS = 2**53
"""Largest number of rows of a table, of which there may be more than of other things."""
_ROWS = {"limit", "num_captions"}


def add_bounds(command: click.Command) -> click.Command:
    """The command, which refuses empty names and texts, as of a variable that is not set, and
    numbers that nothing can have."""
    for parameter in command.params:
        check = None
        if isinstance(parameter.type, click.types.StringParamType):
            check = None if parameter.name in _MAY_BE_EMPTY else _not_empty
        elif isinstance(parameter.type, click.IntRange):
            check = _not_huge
        if check is not None:
            parameter.callback = functools.partial(check, parameter.callback)
    return command


def _not_huge(
    then: Callable[..., Any] | None, context: click.Context, parameter: click.Parameter, value: Any
) -> Any:
    most = _MAX_ROWS if parameter.name in _ROWS else MAX_NUMBER
    if isinstance(value, int) and value > most:
        raise click.BadParameter(f"{value} is more than {most:,}.", context, parameter)
    return value if then is None else then(context, parameter, value)


def _not_empty(
    then: Callable[..., Any] | None, context: click.Context, parameter: click.Parameter, value: Any
) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    if any(isinstance(each, str) and not each.strip() for each in values):
        raise click.BadParameter("is empty; expected text.", context, parameter)
    return value if then is None else then(context, parameter, value)


def _speak(context: click.Context, _parameter: click.Parameter, value: Level | None) -> None:
    if value in ("quiet", "verbose"):
        context.meta[VERBOSITY] = value


def print_result(result: Any, as_json: bool) -> None:
    """Print what a command found, as text or as JSON."""
    echo(result.to_json() if as_json else result)


def json_option(help: str = "Print JSON.") -> Callable[[F], F]:
    return click.option("--json", "as_json", is_flag=True, help=help)


def is_json(options: dict[str, Any]) -> bool:
    """Whether ``--json-progress`` was given: then standard output holds nothing but JSON."""
    return bool(options["progress"] == "json")


class _ByteSize(click.ParamType):
    """A number of bytes: ``256MB``, ``1GiB``."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class _LocalPath(click.Path):
    """A path on this machine; a URL would become a folder of its scheme's name."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not str(value).strip():  # would mean the working directory
            self.fail("is empty; expected a path.", param, ctx)
        if "://" in str(value):
            self.fail(f"{str(value)!r} is a URL; expected a path on this machine.", param, ctx)
        return super().convert(value, param, ctx)


class _FiniteFloat(click.types.FloatParamType):
    """A real number; click's own type also takes nan and infinities."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class FiniteRange(click.FloatRange, _FiniteFloat):
    """A real number within bounds, which nan would pass."""


class _Seed(click.types.IntParamType):
    """A seed, within the bounds of those in configurations."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        seed = super().convert(value, param, ctx)
        if not 0 <= seed <= MAX_SEED:
            self.fail(f"{value!r} is not in the range from 0 to {MAX_SEED} (2^63 - 1).", param, ctx)
        return seed


class _Rank(click.ParamType):
    """A whole number, or ``full``."""

    name = "rank"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "full" or isinstance(value, int):
            return value
        if not str(value).isdecimal():
            self.fail(f"{value!r} is not a rank: expected 0, 1, 2, ... or full.", param, ctx)
        return click.INT.convert(value, param, ctx)


FINITE_FLOAT = _FiniteFloat()
RANK = _Rank()
SEED = _Seed()
BYTE_SIZE = _ByteSize()
LOCAL_PATH = _LocalPath(path_type=Path)
LOCAL_FILE = _LocalPath(path_type=Path, dir_okay=False)
CODECS = click.Choice(get_args(CodecName))
quality_option = click.option(
    "--quality",
    type=FiniteRange(MIN_QUALITY, MAX_QUALITY),
    help="For delta, linear and predictive. Default: 4, an error of 1.1e-2 in LN(h). One step more "
    "halves the error and costs one bit per value.",
)
rank_option = click.option(
    "--rank",
    type=RANK,
    help="With codec predictive: how much of the layer below predicts a layer, from 0 (delta) to "
    f"full (linear). Default: {DEFAULT_RANK}, which a CPU core decodes at 0.4 GB/s or more.",
)
layers_option = click.option(
    "--layers",
    default="all",
    show_default=True,
    help="all; every:3, counted from the last layer; or a list, such as 1-10,17. 0 is the "
    "embedding, which is among all where the preset's pipeline reads it.",
)
exact_option = click.option(
    "--exact-layers",
    help="Layers that are stored exactly too, beside a codec with loss: base, none, or numbers. "
    "base: those that the preset's pipeline reads, the default where it reads some; else none.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(1), help="Use only this many rows, from the start."
)
MODEL_HELP = (
    "The LLM: a Hub id (org/name[@revision]), a folder or a GGUF file; or the text encoder of a "
    "diffusers pipeline, such as org/name/text_encoder."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads per worker, for a new store. Default: all cores, shared among the workers.",
)
text_options = options(
    click.option(
        "--text-column",
        multiple=True,
        callback=lambda _ctx, _param, value: value or None,
        help="Column of captions, with dots into structs: i18n.en. May be given several times, "
        "with weights: caption=1. Default: text, prompt, caption or TEXT.",
    ),
    click.option("--fallback-column", help="Column whose captions stand in where rows have none."),
    click.option(
        "--blank",
        default="error",
        show_default=True,
        type=click.Choice(["error", "skip", "null"]),
        help="Rows without a caption. error: refuse them; skip: leave them out; null: give them "
        "the null caption.",
    ),
)
"""Options of every command that reads captions for a store."""
plan_options = options(
    text_options,
    click.option(
        "--template",
        default="bos",
        show_default=True,
        help="Preset (bos, eos, describe, paper, qwen-image, lumina2, z-image, flux2, "
        "flux2-klein, pixart, sana, wan, krea2, hidream, sd3, auraflow, ideogram4, ltx2, cosmos, "
        "fibo, qwen-image-2.1) or a file that contains {caption}. From qwen-image on: all that the "
        "pipeline of diffusers with this name does to a prompt.",
    ),
    click.option(
        "--keep-prefix/--drop-prefix",
        default=None,
        help="Store the rows of the template's prefix, or do not. Default: as the preset's "
        "pipeline reads them; for others they are dropped.",
    ),
    layers_option,
    click.option(
        "--final-norm",
        type=click.Choice(["normed", "raw", "both"]),
        help="Take the last of L layers after the final norm, as layer L; before it, as layer "
        "L + 1; or both. Default: as the preset's pipeline reads it, or normed.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(1),
        help="Longest caption in tokens, including the template. Longer captions are cut, counted "
        "and listed. Default: that of the preset's pipeline, or 512.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16"]),
        help="Precision of the LLM. auto: bfloat16 on a GPU, float32 on a CPU.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=SEED,
        help="Seed of the order in which captions are stored.",
    ),
)
"""Options of every command that plans an extraction."""
work_options = options(
    click.option(
        "--shard-size",
        "shard_bytes",
        type=BYTE_SIZE,
        default="256MB",
        show_default=True,
        help="Size of a shard, the unit of work and of writing.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Worker processes. Default: one per GPU, or one per CPU core, up to 4. 0: run in "
        "this process, without Dask.",
    ),
    click.option(
        "--cluster",
        default="local",
        show_default=True,
        help="Where to run: local; a Dask scheduler, by address (tcp://...) or file (.json); or "
        "jobs of a batch system (.yaml).",
    ),
    click.option("--force", is_flag=True, help="Start even if the disk has too little free space."),
    click.option(
        "--json-progress",
        "progress",
        flag_value="json",
        default="auto",
        help="Report progress as JSON, one object per line on standard output; all text goes to "
        "standard error.",
    ),
)
"""Options of every command that fills a store."""
