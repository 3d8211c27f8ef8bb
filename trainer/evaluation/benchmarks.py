"""Paths at which each benchmark's own scorer looks for images. Only names; nothing is written.

The rules are those of the scorers themselves, which run unchanged on these folders:

- GenEval, github.com/djghosh13/geneval, ``evaluation/evaluate_images.py``.
- GenAI-Bench, github.com/linzhiqiu/t2v_metrics, ``genai_bench/evaluate.py``.
- T2I-CompBench, github.com/Karine-Huang/T2I-CompBench, ``BLIPvqa_eval``, ``UniDet_eval``,
  ``CLIPScore_eval``, ``3_in_1_eval``.
- DrawBench (arXiv 2205.11487) is rated by people and has no scorer; the layout is the one in which
  HPSv2 scores it, github.com/tgxs002/HPSv2, ``hpsv2/evaluation.py``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...schemas import BenchmarkName, InputError, Prompt

MAX_NAME_BYTES = 255
"""Longest file name, on every common file system."""


@dataclass(frozen=True)
class ImagePaths:
    """Relative paths of all images, and of the other files that a scorer reads.

    Attributes:
        images: [num_prompts][num_images].
        others: path -> content.
    """

    images: list[list[str]]
    others: dict[str, str]


@dataclass(frozen=True)
class BenchmarkFormat:
    """Layout of a benchmark's images.

    Attributes:
        num_images: default number of images per prompt: as many as the benchmark has.
        paths: prompts and number of images per prompt -> paths.
    """

    num_images: int
    paths: Callable[[Sequence[Prompt], int], ImagePaths]


def image_paths(layout: BenchmarkName, prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """Path of each image in a layout.

    Raises:
        InputError: the layout cannot hold these prompts: file names would be too long, not unique,
            or misread by the scorer; or the prompts lack something that the scorer needs.
    """
    paths = BENCHMARK_FORMATS[layout].paths(prompts, num_images)
    prompt_of: dict[str, int] = {}
    for number, files in enumerate(paths.images):
        for file in files:
            name = file.rpartition("/")[2]
            if len(name.encode()) > MAX_NAME_BYTES:
                raise InputError(
                    f"prompt {number} is too long for layout {layout}, whose files are named after "
                    f"their prompt: {len(name.encode())} bytes of at most {MAX_NAME_BYTES}: "
                    f"{prompts[number].text[:60]!r}..."
                )
            if prompt_of.setdefault(file, number) != number:
                raise InputError(
                    f"prompts {prompt_of[file]} and {number} would share the file {file}; give "
                    "each another name"
                )
    return paths


def _plain(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    return ImagePaths(
        [
            [f"{number:05d}/{image:05d}.png" for image in range(num_images)]
            for number in range(len(prompts))
        ],
        {},
    )


def _geneval(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``00000/metadata.jsonl``, the prompt's own line, and ``00000/samples/00000.png``."""
    lines = {}
    for number, prompt in enumerate(prompts):
        record = json.loads(prompt.record) if prompt.record is not None else {}
        missing = [key for key in ("tag", "prompt") if key not in record]
        if missing:
            raise InputError(
                f"prompt {number} has no {' and no '.join(missing)}, which GenEval's scorer reads; "
                "expected the lines of its evaluation_metadata.jsonl"
            )
        lines[f"{number:05d}/metadata.jsonl"] = f"{prompt.record}\n"
    images = [
        [f"{number:05d}/samples/{image:05d}.png" for image in range(num_images)]
        for number in range(len(prompts))
    ]
    return ImagePaths(images, lines)


def _genai_bench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``0/ID.jpeg``: the scorer reads one image per prompt, so others are sets of their own."""
    bad = [prompt.name for prompt in prompts if "/" in prompt.name or prompt.name.startswith(".")]
    if bad:
        raise InputError(f"{bad[0]!r} cannot name an image; expected names such as 00000")
    return ImagePaths(
        [[f"{i}/{prompt.name}.jpeg" for i in range(num_images)] for prompt in prompts], {}
    )


def _drawbench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``samples/0/00000.jpg``: the scorer takes each folder in ``samples`` for a model."""
    return ImagePaths(
        [
            [f"samples/{image}/{number:05d}.jpg" for image in range(num_images)]
            for number in range(len(prompts))
        ],
        {},
    )


def _t2i_compbench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``CATEGORY/samples/PROMPT_000000.png``, numbered through all images of the category.

    The scorers take the prompt from the name, up to its first underscore, and need all images of a
    prompt in a row.
    """
    count: dict[str, int] = defaultdict(int)
    images = []
    for number, prompt in enumerate(prompts):
        bad = [sign for sign in ("_", "/", "\0", "\n", "\t") if sign in prompt.text]
        if bad:
            raise InputError(
                f"prompt {number} has a {bad[0]!r}, which layout t2i-compbench cannot hold: its "
                f"files are named after their prompt: {prompt.text[:60]!r}"
            )
        group = prompt.group or ""
        if "/" in group or group.startswith("."):
            raise InputError(f"prompt {number}: category {group!r} cannot name a folder")
        folder = f"{group}/samples" if group else "samples"
        files = [
            f"{folder}/{prompt.text}_{count[group] + image:06d}.png" for image in range(num_images)
        ]
        count[group] += num_images
        images.append(files)
    return ImagePaths(images, {})


BENCHMARK_FORMATS: dict[BenchmarkName, BenchmarkFormat] = {
    "plain": BenchmarkFormat(1, _plain),
    "geneval": BenchmarkFormat(4, _geneval),
    "genai-bench": BenchmarkFormat(1, _genai_bench),
    "drawbench": BenchmarkFormat(1, _drawbench),
    "t2i-compbench": BenchmarkFormat(10, _t2i_compbench),
}
"""Layouts by the name that ``semroute sample --layout`` takes."""
