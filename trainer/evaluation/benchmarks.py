"""Where each benchmark's own scorer looks for pictures. Arithmetic on names; nothing is written.

Read from the scorers themselves, which run unchanged on these folders:

- GenEval, github.com/djghosh13/geneval, ``evaluation/evaluate_images.py``.
- GenAI-Bench, github.com/linzhiqiu/t2v_metrics, ``genai_bench/evaluate.py``.
- T2I-CompBench, github.com/Karine-Huang/T2I-CompBench, ``BLIPvqa_eval``, ``UniDet_eval``,
  ``CLIPScore_eval``, ``3_in_1_eval``.
- DrawBench (arXiv 2205.11487) is judged by people and has no scorer; the layout is the one that
  HPSv2 scores it in, github.com/tgxs002/HPSv2, ``hpsv2/evaluation.py``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...schemas import BenchmarkName, InputError, Prompt

MAX_NAME_BYTES = 255
"""Of a file's name, on every common file system."""


@dataclass(frozen=True)
class ImagePaths:
    """Relative paths of all pictures, and of the files that a scorer reads beside them.

    Attributes:
        pictures: [num_prompts][num_images].
        beside: path -> content.
    """

    pictures: list[list[str]]
    beside: dict[str, str]


@dataclass(frozen=True)
class BenchmarkFormat:
    """How a benchmark's pictures are laid out.

    Attributes:
        num_images: pictures a prompt where nobody chose: as many as the benchmark has.
        place: prompts and pictures a prompt -> where they go.
    """

    num_images: int
    place: Callable[[Sequence[Prompt], int], ImagePaths]


def image_paths(layout: BenchmarkName, prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """Where each picture goes.

    Raises:
        InputError: the layout cannot hold these prompts: names of files would be too long, the same
            twice or mean something else to the scorer; or its scorer needs what is not there.
    """
    places = BENCHMARK_FORMATS[layout].place(prompts, num_images)
    seen: dict[str, int] = {}
    for number, files in enumerate(places.pictures):
        for file in files:
            name = file.rpartition("/")[2]
            if len(name.encode()) > MAX_NAME_BYTES:
                raise InputError(
                    f"prompt {number} is too long for layout {layout}, whose files are named by "
                    f"their prompt: {len(name.encode())} bytes of at most {MAX_NAME_BYTES}: "
                    f"{prompts[number].text[:60]!r}..."
                )
            if seen.setdefault(file, number) != number:
                raise InputError(
                    f"prompts {seen[file]} and {number} would share the file {file}; give each "
                    "another name"
                )
    return places


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
    beside = {}
    for number, prompt in enumerate(prompts):
        record = json.loads(prompt.record) if prompt.record is not None else {}
        missing = [key for key in ("tag", "prompt") if key not in record]
        if missing:
            raise InputError(
                f"prompt {number} has no {' and no '.join(missing)}, which GenEval's scorer reads; "
                "expected the lines of its evaluation_metadata.jsonl"
            )
        beside[f"{number:05d}/metadata.jsonl"] = f"{prompt.record}\n"
    pictures = [
        [f"{number:05d}/samples/{image:05d}.png" for image in range(num_images)]
        for number in range(len(prompts))
    ]
    return ImagePaths(pictures, beside)


def _genai_bench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``0/ID.jpeg``: the scorer reads one picture a prompt, so others are sets of their own."""
    bad = [prompt.name for prompt in prompts if "/" in prompt.name or prompt.name.startswith(".")]
    if bad:
        raise InputError(f"{bad[0]!r} cannot name a picture; expected names such as 00000")
    return ImagePaths(
        [[f"{i}/{prompt.name}.jpeg" for i in range(num_images)] for prompt in prompts], {}
    )


def _drawbench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``samples/0/00000.jpg``: in ``samples`` each folder is a model of the scorer."""
    return ImagePaths(
        [
            [f"samples/{image}/{number:05d}.jpg" for image in range(num_images)]
            for number in range(len(prompts))
        ],
        {},
    )


def _t2i_compbench(prompts: Sequence[Prompt], num_images: int) -> ImagePaths:
    """``CATEGORY/samples/PROMPT_000000.png``, counted through all pictures of the category.

    The scorers take the prompt from the name, up to its first underscore, and need all pictures of
    a prompt in a row.
    """
    count: dict[str, int] = defaultdict(int)
    pictures = []
    for number, prompt in enumerate(prompts):
        bad = [sign for sign in ("_", "/", "\0", "\n", "\t") if sign in prompt.text]
        if bad:
            raise InputError(
                f"prompt {number} has a {bad[0]!r}, which layout t2i-compbench cannot hold: its "
                f"files are named by their prompt: {prompt.text[:60]!r}"
            )
        group = prompt.group or ""
        if "/" in group or group.startswith("."):
            raise InputError(f"prompt {number}: category {group!r} cannot name a folder")
        folder = f"{group}/samples" if group else "samples"
        files = [
            f"{folder}/{prompt.text}_{count[group] + image:06d}.png" for image in range(num_images)
        ]
        count[group] += num_images
        pictures.append(files)
    return ImagePaths(pictures, {})


BENCHMARK_FORMATS: dict[BenchmarkName, BenchmarkFormat] = {
    "plain": BenchmarkFormat(1, _plain),
    "geneval": BenchmarkFormat(4, _geneval),
    "genai-bench": BenchmarkFormat(1, _genai_bench),
    "drawbench": BenchmarkFormat(1, _drawbench),
    "t2i-compbench": BenchmarkFormat(10, _t2i_compbench),
}
"""By the name that ``semroute sample --layout`` takes."""
