"""Datasets of the world of shapes: captioned images for training, tuning and testing."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ...schemas import InputError
from ...schemas.atomic import whole_folder
from ...schemas.json_file import load_json
from ...schemas.verbosity import progress_bar
from .images import render
from .scenes import Scene, sample_scene, split_of

MAX_CAPTIONS = 500_000
"""Most captions of one dataset: a small part of all there are, so that new ones are found fast."""


@dataclass(frozen=True)
class WorldSummary:
    """Counts of what :func:`write_world` wrote."""

    num_train_images: int
    num_train_captions: int
    num_dev_captions: int
    """Captions of pairs seen in training; one image each."""
    num_test_captions: int
    """Captions of pairs seen in training; one image each."""
    num_held_out_captions: int
    """Captions with a held-out pair; one image each."""
    by: str
    """What no two files share: ``scene`` or ``caption``."""

    def __str__(self) -> str:
        return (
            f"for training: {self.num_train_images:,} images of {self.num_train_captions:,} "
            f"captions; for choosing settings: {self.num_dev_captions:,} captions of "
            f"{'other scenes' if self.by == 'scene' else 'other wording'} with the same pairs of "
            f"colour and shape; for testing: {self.num_test_captions:,} more of these, and "
            f"{self.num_held_out_captions:,} with held-out pairs"
        )


def write_world(
    out: str | Path,
    num: int,
    seed: int,
    images_per_caption: int = 4,
    num_test: int = 1000,
    num_dev: int = 200,
    by: Literal["scene", "caption"] = "scene",
    progress: bool = True,
) -> WorldSummary:
    """Write ``train.parquet``, ``dev.parquet`` and ``test.parquet`` into the folder ``out``.

    One row per image: ``text``, ``image`` (struct of PNG ``bytes`` and ``path``, as Hugging Face
    datasets stores images), ``scene`` (JSON of ``Scene.to_dict``) and ``split``: ``train``,
    ``dev`` and ``test`` (pairs of colour and shape that training shows, scenes that it does not) or
    ``held-out`` (scenes with a pair that training never shows). ``dev`` is for choosing settings,
    the test file for scoring. No scene occurs in two files. The same arguments give the same rows.

    Args:
        out: a folder that does not exist yet, or is empty; it appears only when it is complete.
        num: images in the training file, a multiple of ``images_per_caption``.
        images_per_caption: images of each training caption, which differ in what it leaves open.
        num_test: rows of the test file, an even number: half ``test``, half ``held-out``.
        num_dev: rows of the dev file.
        by: ``caption``: only captions differ between files, as in the first release; a scene of
            training may be asked for in other words.

    Raises:
        InputError: ``out`` is not empty, the numbers do not divide, or there are more captions than
            ``MAX_CAPTIONS``.
    """
    out = Path(out)
    if num < 1 or images_per_caption < 1 or num % images_per_caption:
        raise InputError(
            f"num {num} is not a positive multiple of images_per_caption {images_per_caption}: "
            "change one of them"
        )
    if num_test < 2 or num_test % 2:
        raise InputError(f"num_test {num_test} is not a positive even number: half is held out")
    num_captions = num // images_per_caption + num_dev + num_test
    if num_captions > MAX_CAPTIONS:
        raise InputError(
            f"found {num_captions:,} different captions to write, expected at most "
            f"{MAX_CAPTIONS:,}: ask for fewer, or for more images per caption"
        )
    if num_dev < 1:
        raise InputError(f"num_dev is {num_dev}, expected at least 1")
    rng = np.random.default_rng(seed)
    taken: set[str] = set()
    held_out = list(_new_captions(num_test // 2, None, taken, rng))
    splits = ("test", "dev", "train") if by == "scene" else ("any",) * 3
    numbers = (num_test // 2, num_dev, num // images_per_caption)
    test, dev, train = (
        list(_new_captions(number, split, taken, rng))
        for number, split in zip(numbers, splits, strict=True)
    )
    files = {
        "train": [(*pair, "train") for pair in train for _ in range(images_per_caption)],
        "dev": [(*pair, "dev") for pair in dev],
        "test": [*((*pair, "test") for pair in test), *((*pair, "held-out") for pair in held_out)],
    }
    total = sum(map(len, files.values()))
    with (
        whole_folder(out) as unfinished,
        progress_bar(total=total, unit="image", disable=not progress) as bar,
    ):
        for name, rows in files.items():
            pq.write_table(_table(name, rows, rng, bar), unfinished / f"{name}.parquet")
    return WorldSummary(num, len(train), len(dev), len(test), len(held_out), by)


def read_scenes(table: pa.Table) -> list[Scene]:
    """Scenes of a table of :func:`write_world`, row by row, from its column ``scene``.

    Raises:
        ValueError: one is no scene.
    """
    texts = table.column("scene").to_pylist()
    return [Scene.from_dict(load_json(text, f"scene {row}")) for row, text in enumerate(texts)]


def _new_captions(
    num: int, split: str | None, taken: set[str], rng: np.random.Generator
) -> Iterator[tuple[str, Scene]]:
    """``num`` random captions that are not in ``taken``, to which they are added.

    Args:
        split: of their scenes; ``any``: of all without held-out pairs; None: of those with one.
    """
    for _ in range(num):
        text = None
        while text is None or text in taken:
            scene = sample_scene(rng, split is None)
            while split not in (None, "any") and split_of(scene) != split:
                scene = sample_scene(rng, False)
            text = scene.caption(rng)
        taken.add(text)
        yield text, scene


def _table(
    name: str, rows: Sequence[tuple[str, Scene, str]], rng: np.random.Generator, bar: Any
) -> pa.Table:
    images = []
    for index, (_, scene, _) in enumerate(rows):
        buffer = io.BytesIO()
        Image.fromarray(render(scene, rng)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{name}-{index:06d}.png"})
        bar.update()
    texts, scenes, splits = zip(*rows, strict=True)
    documents = [json.dumps(scene.to_dict()) for scene in scenes]
    return pa.table([list(texts), images, documents, list(splits)], schema=_world_schema())


def _world_schema() -> pa.Schema:
    features: dict[str, Any] = {
        name: {"dtype": "string", "_type": "Value"} for name in ("text", "scene", "split")
    }
    features["image"] = {"_type": "Image"}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [("text", pa.string()), ("image", image), ("scene", pa.string()), ("split", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
