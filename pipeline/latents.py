"""Images <-> latents. ``pixels`` is the identity: the image itself, scaled to [-1, 1]."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..schemas import InputError


@dataclass(frozen=True)
class PixelCodec:
    """Latent = code * scale + shift; code is uint8, latent in [-1, 1]."""

    scale: float
    shift: float


def pixel_codec() -> PixelCodec:
    """0 -> -1, 255 -> 1."""
    return PixelCodec(scale=2 / 255, shift=-1.0)


@dataclass(frozen=True)
class Images:
    """What all images of a table share.

    Attributes:
        shape: channels, height and width after resizing.
        digests: sha256 of each encoded file.
        fingerprint: sha256 over the digests.
    """

    shape: tuple[int, int, int]
    digests: list[str]
    fingerprint: str


def describe_images(files: Iterable[bytes], source: str, size: int | None) -> Images:
    """Look at every file once, before any work.

    Raises:
        InputError: an image is missing or not readable, or sizes differ and none is asked for.
    """
    digests: list[str] = []
    broken: list[str] = []
    sizes: dict[tuple[int, int], int] = {}  # height and width -> first row that has it
    digest = hashlib.sha256()
    for row, file in enumerate(files):
        digests.append(hashlib.sha256(file).hexdigest())
        digest.update(bytes.fromhex(digests[-1]))
        try:
            with Image.open(io.BytesIO(file)) as image:
                sizes.setdefault((image.height, image.width), row)
        except (UnidentifiedImageError, OSError) as error:
            broken.append(f"row {row}: {error}")
    if broken:
        listed = "\n  ".join(broken[:5])
        raise InputError(
            f"{source}: {len(broken)} of {len(digests)} images cannot be read:\n  {listed}"
        )
    if size is None and len(sizes) > 1:
        (first, _), (second, row) = list(sizes.items())[:2]
        raise InputError(
            f"{source}: images have {len(sizes)} sizes (row 0 is {first[1]} x {first[0]}, row "
            f"{row} is {second[1]} x {second[0]}); expected one. Name one with --size."
        )
    height, width = (size, size) if size is not None else next(iter(sizes))
    return Images((3, height, width), digests, digest.hexdigest())


def image_to_codes(file: bytes, size: tuple[int, ...]) -> np.ndarray:
    """An encoded image -> RGB uint8 ``[3, H, W]``; resized on its shorter side, then cropped in the
    centre, where it has not that size already."""
    height, width = size
    with Image.open(io.BytesIO(file)) as opened:
        image = opened.convert("RGB")
    if (image.height, image.width) != (height, width):
        factor = max(height / image.height, width / image.width)
        resized = (
            max(width, round(image.width * factor)),
            max(height, round(image.height * factor)),
        )
        image = image.resize(resized, Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.uint8).transpose(2, 0, 1)


def latents_to_images(latents: np.ndarray, scale: float, shift: float) -> np.ndarray:
    """Pixel latents float ``[n, 3, H, W]`` -> images uint8 ``[n, H, W, 3]``, clipped."""
    codes = np.rint((latents - shift) / scale).clip(0, 255).astype(np.uint8)
    return codes.transpose(0, 2, 3, 1)
