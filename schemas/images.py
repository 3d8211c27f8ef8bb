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
        text: what is to be drawn.
        name: what its file calls it; otherwise its number, of five digits.
        group: what it tests (GenEval's ``tag``, the ``category`` of most others), if the file says.
        record: its line of a .jsonl, as it stands there.
    """

    text: str
    name: str
    group: str | None = None
    record: str | None = None


class ImageSetRecord(Contract):
    """``pictures.json``: how the pictures of a folder are drawn, whichever process draws them."""

    format: Literal["semroute.pictures"] = "semroute.pictures"
    format_version: Literal[1] = 1
    layout: BenchmarkName
    """Whose scorer the folder is laid out for."""
    num_prompts: Annotated[int, Field(ge=1)]
    prompts: str
    """Fingerprint of names and texts of the prompts, in order."""
    num_images: Annotated[int, Field(ge=1)]
    """Pictures a prompt."""
    run: str
    """When the run was begun, which tells it from others wherever it is."""
    step: int
    weights: Literal["ema", "model"]
    codec: str
    """Of the features; ``none`` where the LLM encoded the prompts."""
    sampling: dict[str, int | float | str | list[float] | None]
    """Seed, steps, solver, guidance and clock."""


class JudgeRecord(Contract):
    """``judge.json``: who says what pictures show, and how it is asked."""

    format: Literal["semroute.judge"] = "semroute.judge"
    format_version: Literal[1] = 1
    judge: str
    """As it was named, of a hub id with the commit."""
    files: dict[str, str]
    """sha256 of its configuration and weights."""
    dtype: Literal["float32", "bfloat16"]
    question: str
    """With ``{}`` where the caption goes."""
