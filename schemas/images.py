"""Prompts, and the records of a folder of their images."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from .contract import Contract

BenchmarkName = Literal["plain", "geneval", "genai-bench", "drawbench", "t2i-compbench"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: the caption.
        name: its name in the file; otherwise its number, in five digits.
        group: the skill that it tests (GenEval's ``tag``, the ``category`` of most others), if the
            file names one.
        record: its line in a .jsonl file, unchanged.
    """

    text: str
    name: str
    group: str | None = None
    record: str | None = None


class ImageSetRecord(Contract):
    """``pictures.json``: how the images of a folder are generated, by whatever process."""

    format: Literal["semroute.pictures"] = "semroute.pictures"
    format_version: Literal[1] = 1
    layout: BenchmarkName
    """Benchmark whose scorer can read the folder."""
    num_prompts: Annotated[int, Field(ge=1)]
    prompts: str
    """Fingerprint of names and texts of the prompts, in order."""
    num_images: Annotated[int, Field(ge=1)]
    """Images per prompt."""
    run: str
    """Time at which the run was created, which identifies it wherever it is."""
    step: int
    weights: Literal["ema", "model"]
    codec: str
    """Codec of the features; ``none`` if the LLM encoded the prompts."""
    sampling: dict[str, int | float | str | list[float] | None]
    """Seed, steps, solver, guidance and clock."""


class JudgeRecord(Contract):
    """``judge.json``: the judge model that scores images, and its question."""

    format: Literal["semroute.judge"] = "semroute.judge"
    format_version: Literal[1] = 1
    judge: str
    """Name as given; for a hub id, with the commit."""
    files: dict[str, str]
    """File name -> sha256, for its configuration and weights."""
    dtype: Literal["float32", "bfloat16"]
    question: str
    """The question, with ``{}`` for the caption."""
