"""Writes the world of shapes: captioned images to train on, to choose by, and to judge by."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from ...schemas import InputError
from .images import render
from .scenes import Scene, sample_scene

MAX_CAPTIONS = 500_000
"""Of a world: a small part of those there are, so that new ones are found at once."""


@dataclass(frozen=True)
class WorldSummary:
    """What ``write_world`` wrote."""

    num_train_images: int
    num_train_captions: int
    num_dev_captions: int
    """Of seen pairs; one image each."""
    num_test_captions: int
    """Of seen pairs; one image each."""
    num_held_out_captions: int
    """With a held-out pair; one image each."""

    def __str__(self) -> str:
        return (
            f"to train on: {self.num_train_images:,} images of {self.num_train_captions:,} "
            f"captions; to choose by: {self.num_dev_captions:,} other captions of the same pairs "
            f"of colour and shape; to test on: {self.num_test_captions:,} such, and "
            f"{self.num_held_out_captions:,} of held-out pairs"
        )


def write_world(
    out: str | Path,
    num: int,
    seed: int,
    images_per_caption: int = 4,
    num_test: int = 1000,
    num_dev: int = 200,
    progress: bool = True,
) -> WorldSummary:
    """Write ``train.parquet``, ``dev.parquet`` and ``test.parquet`` into the folder ``out``.

    A row is an image: ``text``, ``image`` (struct of PNG ``bytes`` and ``path``, as Hugging Face
    datasets stores images), ``scene`` (JSON of ``Scene.to_dict``) and ``split``: ``train``,
    ``dev`` and ``test`` (pairs of colour and shape that training shows, captions that it does not)
    or ``held-out`` (captions with a pair that training never shows). ``dev`` is to choose settings
    by, the test file to judge by. No caption occurs in two files. The same arguments give the same
    rows.

    Args:
        out: a folder that does not exist yet, or is empty; it appears only when it is complete.
        num: images in the training file, a multiple of ``images_per_caption``.
        images_per_caption: images of each training caption, differing in what it leaves open.
        num_test: rows of the test file, an even number: half ``test``, half ``held-out``.
        num_dev: rows of the dev file.

    Raises:
        InputError: ``out`` holds something, the numbers do not divide, or more captions are asked
            for than ``MAX_CAPTIONS``.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: choose another folder or delete it")
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
            f"found {num_captions:,} captions to draw, expected at most {MAX_CAPTIONS:,}, for all "
            "must differ: ask for fewer, or for more images a caption"
        )
    if num_dev < 1:
        raise InputError(f"num_dev is {num_dev}, expected at least 1")
    rng = np.random.default_rng(seed)
    taken: set[str] = set()
    held_out = list(_new_captions(num_test // 2, True, taken, rng))
    test = list(_new_captions(num_test // 2, False, taken, rng))
    dev = list(_new_captions(num_dev, False, taken, rng))
    train = list(_new_captions(num // images_per_caption, False, taken, rng))
    files = {
        "train": [(*pair, "train") for pair in train for _ in range(images_per_caption)],
        "dev": [(*pair, "dev") for pair in dev],
        "test": [*((*pair, "test") for pair in test), *((*pair, "held-out") for pair in held_out)],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        total = sum(map(len, files.values()))
        with tqdm(total=total, unit="image", disable=not progress) as bar:
            for name, rows in files.items():
                pq.write_table(_table(name, rows, rng, bar), partial / f"{name}.parquet")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return WorldSummary(num, len(train), len(dev), len(test), len(held_out))


def read_scenes(table: pa.Table) -> list[Scene]:
    """The scenes of a table of ``write_world``, row by row, from its column ``scene``."""
    return [Scene.from_dict(json.loads(text)) for text in table.column("scene").to_pylist()]


def _new_captions(
    num: int, held_out: bool, taken: set[str], rng: np.random.Generator
) -> Iterator[tuple[str, Scene]]:
    """Draw ``num`` captions that are not in ``taken`` and add them to it."""
    for _ in range(num):
        text = None
        while text is None or text in taken:
            scene = sample_scene(rng, held_out)
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
