"""A folder of images of many prompts: divided among processes; only missing images are generated.

The noise of an image is a function of the seed, its prompt's number and its own number. Batches are
fixed by their size and generated whole. So the bytes do not depend on the number of processes and
restarts; another batch size changes them by rounding.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...pipeline.style import DPI
from ...schemas import (
    BenchmarkName,
    ImageSetRecord,
    InputError,
    Prompt,
    differences,
    fingerprint,
    parse,
    publish,
    refuse_differences,
)
from ...schemas.json_file import read_json
from ...schemas.verbosity import progress_bar
from ..diffusion.sampling import SamplingConfig
from ..plots.images import CAPTIONS, sample_grid
from .benchmarks import ImagePaths, image_paths
from .generate import CaptionSet, Decode, generate

if TYPE_CHECKING:
    from ..runs.run import Run

RECORD = "pictures.json"
UNFINISHED = "unfinished"
"""Folder in which files are written before they get their names: no scorer looks there."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
NUM_SHOWN = 24
"""Number of images in the grid of an image set."""
_IMAGE_SHIFT = 32


@dataclass(frozen=True)
class ImageSet:
    """Content of a folder of images, generated or not. Images are numbered from 0:
    ``prompt * num_images + image``.

    Attributes:
        out: the folder.
        prompts: the prompts.
        paths: where each image goes.
        record: how images are generated.
    """

    out: Path
    prompts: Sequence[Prompt]
    paths: ImagePaths
    record: ImageSetRecord

    @property
    def num_images(self) -> int:
        """Number of images per prompt."""
        return self.record.num_images

    def __len__(self) -> int:
        return len(self.prompts) * self.num_images

    def file(self, number: int) -> Path:
        """File of an image."""
        prompt, image = divmod(number, self.num_images)
        return self.out / self.paths.images[prompt][image]

    def write(self, file: Path, content: bytes) -> None:
        """Write a file, whole or not at all.

        It is written in another folder first, because scorers read whatever a folder holds, and
        under a name of this process, because others write at the same time.
        """
        partial = self.out / UNFINISHED / f"{os.uname().nodename}-{os.getpid()}{file.suffix}"
        for folder in (file.parent, partial.parent):
            folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        publish(partial, file)

    def missing(self) -> list[int]:
        """Images that do not exist yet, ascending."""
        return [number for number in range(len(self)) if not self.file(number).exists()]


def open_image_set(
    out: Path,
    prompts: Sequence[Prompt],
    run: "Run",
    *,
    layout: BenchmarkName,
    num_images: int,
    codec: str,
    sampling: Mapping[str, Any],
) -> ImageSet:
    """Create a folder of images, or open it again, and write everything in it but the images.

    Args:
        num_images: images per prompt.
        codec: codec of the features; ``none`` if the LLM encodes the prompts.
        sampling: the other settings of :func:`generate_image_set`.

    Raises:
        InputError: the layout cannot hold the prompts, or the folder holds something else.
    """
    paths = image_paths(layout, prompts, num_images)
    record = ImageSetRecord(
        layout=layout,
        num_prompts=len(prompts),
        prompts=fingerprint([(prompt.name, prompt.text) for prompt in prompts]),
        num_images=num_images,
        run=run.record.created,
        step=run.step,
        weights=run.source,
        codec=codec,
        sampling=json.loads(json.dumps(sampling)),
    )
    _check_folder(out, record)
    image_set = ImageSet(out, prompts, paths, record)
    lines = [
        {"image": file, "caption": prompt.text, "number": number, "group": prompt.group}
        for number, (prompt, files) in enumerate(zip(prompts, paths.images, strict=True))
        for file in files
    ]
    captions = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    # The record first: a folder with any file has the record, whichever process came first.
    contents = {RECORD: record.model_dump_json(indent=1) + "\n"}
    for name, content in (contents | paths.others | {CAPTIONS: captions}).items():
        if not (out / name).exists():
            image_set.write(out / name, content.encode())
    return image_set


def _check_folder(out: Path, record: ImageSetRecord) -> None:
    """Refuse a folder of other images, or of anything else."""
    names = {path.name for path in out.iterdir()} - {UNFINISHED} if out.exists() else set()
    file = out / RECORD
    if not file.exists():
        if names:
            raise InputError(
                f"{out} is not empty and has no {RECORD}: it holds {', '.join(sorted(names)[:5])}. "
                "Name a new folder with --out."
            )
        return
    before = parse(ImageSetRecord, read_json(file, follow=True), str(file))
    refuse_differences(
        differences(record, before),
        f"{out} has images that were generated differently; requested, against the existing ones",
        "Run the original command, or name another folder with --out.",
    )


def generate_image_set(
    image_set: ImageSet,
    run: "Run",
    captions: CaptionSet,
    decode: Decode,
    sampling: SamplingConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int,
    seed: int,
    shape: tuple[int, int, int] | None = None,
) -> int:
    """Generate the missing images of one shard.

    Args:
        captions: one per prompt.
        decode: latents -> images.
        shard: number of the shard, from 0, and number of shards. Shards take whole batches in turn,
            and may run at the same time.
        batch_size: images sampled at once.
        sampling, seed, shape: as for :func:`semroute.trainer.evaluation.generate.generate`.

    Returns:
        Number of images generated.
    """
    index, num_shards = shard
    batches = [
        range(first, min(first + batch_size, len(image_set)))
        for first in range(index * batch_size, len(image_set), num_shards * batch_size)
    ]
    missing = {*image_set.missing()}
    num_own = sum(map(len, batches))
    num_missing = sum(number in missing for batch in batches for number in batch)
    with progress_bar(
        total=num_own,
        initial=num_own - num_missing,
        unit="image",
        desc=f"shard {index} of {num_shards}" if num_shards > 1 else None,
    ) as bar:
        for batch in batches:
            wanted = [number for number in batch if number in missing]
            if not wanted:
                continue
            pairs = [divmod(number, image_set.num_images) for number in batch]
            latents = generate(
                run.model,
                run.flow,
                captions.features,
                [captions.ids[prompt] for prompt, _ in pairs],
                sampling,
                numbers=[noise_number(prompt, image) for prompt, image in pairs],
                batch_size=len(batch),
                seed=seed,
                shape=shape,
                progress=False,
            )
            images = decode(latents)
            for number in wanted:
                file, content = image_set.file(number), io.BytesIO()
                Image.fromarray(images[number - batch.start]).save(content, FORMATS[file.suffix])
                image_set.write(file, content.getvalue())
            bar.update(len(wanted))
    return num_missing


def finish_image_set(image_set: ImageSet) -> Path:
    """Once all images exist, write ``grid.png`` and remove what killed processes left behind.

    The grid shows the first image of prompts from all over the file.

    Returns:
        The grid.
    """
    num = len(image_set.prompts)
    shown = np.linspace(0, num - 1, min(NUM_SHOWN, num)).astype(int).tolist()
    images = []
    for prompt in shown:
        with Image.open(image_set.file(prompt * image_set.num_images)) as image:
            images.append(np.asarray(image.convert("RGB")))
    figure = sample_grid(np.stack(images), [image_set.prompts[prompt].text for prompt in shown])
    path, content = image_set.out / "grid.png", io.BytesIO()
    figure.savefig(content, dpi=DPI)
    image_set.write(path, content.getvalue())
    shutil.rmtree(image_set.out / UNFINISHED, ignore_errors=True)
    return path


def noise_number(prompt: int, image: int) -> int:
    """Number that the noise of an image is generated from.

    For the first image of a prompt it is the prompt's number, as if each prompt had one image.
    """
    return prompt + (image << _IMAGE_SHIFT)


def find_shard(text: str | None) -> tuple[int, int]:
    """``I/N`` -> I, N; without it, the rank and number of processes that torchrun and ``accelerate
    launch`` set, or 0, 1.

    Raises:
        InputError: another form, or no such shard.
    """
    if text is None:
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        return int(os.environ["RANK"]) if num_processes > 1 else 0, num_processes
    index, slash, num = text.partition("/")
    if not (slash and index.isdecimal() and num.isdecimal() and int(index) < int(num)):
        raise InputError(
            f"--shard {text!r}: expected I/N, from 0/N to N-1/N, such as 0/4, 1/4, 2/4 and 3/4"
        )
    return int(index), int(num)
