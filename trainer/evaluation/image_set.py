"""Pictures of many prompts in a folder: dealt to processes, and drawn where they are not yet.

The noise of a picture is a function of the seed, its prompt's number and its own; batches are fixed
by the number of pictures in one and drawn whole. So with the same batch size the bytes are the same
whatever the processes and restarts, and with another one they differ by rounding.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

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
from ..diffusion.sampling import SamplingConfig
from ..plots.images import CAPTIONS, sample_grid
from ..runs.run import Run
from .benchmarks import ImagePaths, image_paths
from .generate import Decode, Features, generate

RECORD = "pictures.json"
UNFINISHED = "unfinished"
"""Where files are written before they have their names: no scorer looks there."""
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
NUM_SHOWN = 24
"""Pictures in the grid of a gallery."""
_IMAGE_SHIFT = 32


@dataclass(frozen=True)
class ImageSet:
    """What a folder is to hold.

    Attributes:
        out: the folder.
        prompts: one each.
        places: where pictures go.
        record: how they are drawn.
    """

    out: Path
    prompts: Sequence[Prompt]
    places: ImagePaths
    record: ImageSetRecord

    @property
    def num_images(self) -> int:
        return self.record.num_images

    def __len__(self) -> int:
        return len(self.prompts) * self.num_images

    def file(self, picture: int) -> Path:
        """Of picture ``prompt * num_images + image``."""
        number, image = divmod(picture, self.num_images)
        return self.out / self.places.pictures[number][image]

    def write(self, file: Path, content: bytes) -> None:
        """A file, whole or not at all: elsewhere first, for scorers read whatever is in a folder,
        and under a name of this process, for others write at the same time."""
        beside = self.out / UNFINISHED / f"{os.uname().nodename}-{os.getpid()}{file.suffix}"
        for folder in (file.parent, beside.parent):
            folder.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        publish(beside, file)

    def missing(self) -> list[int]:
        """Pictures that are not there, ascending."""
        return [picture for picture in range(len(self)) if not self.file(picture).exists()]


def open_image_set(
    out: Path,
    prompts: Sequence[Prompt],
    run: Run,
    *,
    layout: BenchmarkName,
    num_images: int,
    codec: str,
    sampling: Mapping[str, Any],
) -> ImageSet:
    """Begin a folder of pictures, or come back to it: everything in it but the pictures is written.

    Args:
        num_images: pictures a prompt.
        codec: of the features, ``none`` where the LLM encodes the prompts.
        sampling: what :func:`generate_image_set` is given besides.

    Raises:
        InputError: the layout cannot hold the prompts, or the folder holds something else.
    """
    places = image_paths(layout, prompts, num_images)
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
    gallery = ImageSet(out, prompts, places, record)
    lines = [
        {"image": file, "caption": prompt.text, "number": number, "group": prompt.group}
        for number, (prompt, files) in enumerate(zip(prompts, places.pictures, strict=True))
        for file in files
    ]
    captions = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    # The record first: a folder that has anything has it, whichever process is the first.
    contents = {RECORD: record.model_dump_json(indent=1) + "\n"}
    for name, content in (contents | places.beside | {CAPTIONS: captions}).items():
        if not (out / name).exists():
            gallery.write(out / name, content.encode())
    return gallery


def _check_folder(out: Path, record: ImageSetRecord) -> None:
    """Refuse a folder of other pictures, or of anything else."""
    found = {path.name for path in out.iterdir()} - {UNFINISHED} if out.exists() else set()
    file = out / RECORD
    if not file.exists():
        if found:
            raise InputError(
                f"{out} is not empty and has no {RECORD}: it holds {', '.join(sorted(found)[:5])}. "
                "Name a new folder with --out."
            )
        return
    try:
        before = parse(ImageSetRecord, json.loads(file.read_text("utf-8")), str(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    refuse_differences(
        differences(record, before),
        f"{out} has pictures that are drawn otherwise; what you asked for now, against what it has",
        "Run the command as it was, or name another folder with --out.",
    )


def generate_image_set(
    gallery: ImageSet,
    run: Run,
    features: Features,
    caption_ids: Sequence[int],
    decode: Decode,
    how: SamplingConfig,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int,
    seed: int,
    shape: tuple[int, int, int] | None = None,
) -> int:
    """Draw the pictures of one shard that are not there yet.

    Args:
        caption_ids: of the prompts, in ``features``.
        decode: latents -> images.
        shard: which of how many, the first being 0. Shards take whole batches in turn, and may run
            at the same time.
        batch_size: pictures sampled at once.
        how, seed, shape: as for :func:`semroute.trainer.evaluation.generate.generate`.

    Returns:
        How many were drawn.
    """
    index, num_shards = shard
    batches = [
        range(first, min(first + batch_size, len(gallery)))
        for first in range(index * batch_size, len(gallery), num_shards * batch_size)
    ]
    missing = {*gallery.missing()}
    num_own = sum(map(len, batches))
    num_left = sum(picture in missing for batch in batches for picture in batch)
    with tqdm(
        total=num_own,
        initial=num_own - num_left,
        unit="image",
        desc=f"shard {index} of {num_shards}" if num_shards > 1 else None,
    ) as bar:
        for batch in batches:
            wanted = [picture for picture in batch if picture in missing]
            if not wanted:
                continue
            pairs = [divmod(picture, gallery.num_images) for picture in batch]
            latents = generate(
                run.model,
                run.flow,
                features,
                [caption_ids[number] for number, _ in pairs],
                how,
                numbers=[image_number(number, image) for number, image in pairs],
                batch_size=len(batch),
                seed=seed,
                shape=shape,
                progress=False,
            )
            images = decode(latents)
            for picture in wanted:
                file, content = gallery.file(picture), io.BytesIO()
                Image.fromarray(images[picture - batch.start]).save(content, FORMATS[file.suffix])
                gallery.write(file, content.getvalue())
            bar.update(len(wanted))
    return num_left


def finish_image_set(gallery: ImageSet) -> Path:
    """When all pictures are there: write ``grid.png``, first pictures of prompts from all over the
    file, and remove what killed processes left.

    Returns:
        The grid.
    """
    num = len(gallery.prompts)
    shown = np.linspace(0, num - 1, min(NUM_SHOWN, num)).astype(int).tolist()
    images = []
    for number in shown:
        with Image.open(gallery.file(number * gallery.num_images)) as image:
            images.append(np.asarray(image.convert("RGB")))
    figure = sample_grid(np.stack(images), [gallery.prompts[number].text for number in shown])
    path, content = gallery.out / "grid.png", io.BytesIO()
    figure.savefig(content, dpi=DPI)
    gallery.write(path, content.getvalue())
    shutil.rmtree(gallery.out / UNFINISHED, ignore_errors=True)
    return path


def image_number(prompt: int, image: int) -> int:
    """The number that the noise of a picture is drawn by; that of the first picture of a prompt is
    the prompt's, as where there is only one of each."""
    return prompt + (image << _IMAGE_SHIFT)


def find_shard(text: str | None) -> tuple[int, int]:
    """``I/N`` -> I, N; without it what torchrun and ``accelerate launch`` tell their processes, or
    the whole.

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
