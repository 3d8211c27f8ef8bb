"""Files of images -> pixels; sizes and aspect-ratio buckets."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...schemas import InputError
from .orientation import TURNS, exif_orientation, orientation_of
from .table import Unreadable

_PNG_TEXTS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_PNG_START = 8


@dataclass(frozen=True)
class Images:
    """Facts about every image file of a table.

    Attributes:
        size: height and width that all images have, or will have after resizing.
        digests: sha256 of each encoded file; None where there is no file.
        broken: row -> why its image cannot be read, as far as its header tells.
        sizes: height and width of each image in its file, int64 ``[rows, 2]``; 0 where broken.
    """

    size: tuple[int, int]
    digests: list[str | None]
    broken: dict[int, str]
    sizes: np.ndarray


def choose_buckets(size: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths of about the same area and many ratios, the square first.

    Sides are multiples of ``step``. The longer one goes from ``size`` to twice that, and the
    shorter one is the largest with an area of at most size x size, as in kohya's sd-scripts. With
    1,024 and 64 these are 33 shapes, all of them SDXL's (arXiv 2307.01952, appendix I).

    Raises:
        InputError: ``size`` is not a multiple of ``step``.
    """
    if size % step:
        raise InputError(f"--size {size} is not a multiple of the step of --buckets, {step}")
    pairs = [(long, size * size // long // step * step) for long in range(size, 2 * size + 1, step)]
    both = {pair for long, short in pairs for pair in ((long, short), (short, long))}
    return sorted(both, key=lambda pair: (abs(pair[0] - pair[1]), pair))


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Index of the bucket with the nearest ratio, by image, int32 ``[rows]``; 0 without a size.

    Ratios are compared as factors (by their logarithm). Of buckets with the same ratio the one with
    the larger area is taken.

    Args:
        sizes: height and width, ``[rows, 2]``.
    """
    known = np.asarray(buckets, np.float64)
    order = np.argsort(-known.prod(1), kind="stable")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(sizes[:, 0] / sizes[:, 1])
        away = np.abs(ratios[:, None] - np.log(known[order, 0] / known[order, 1]))
    nearest = order[np.argmin(np.round(np.nan_to_num(away), 9), 1)]
    return np.where(sizes.min(1) > 0, nearest, 0).astype(np.int32)


def describe_images(files: Iterable[bytes | Unreadable], source: str, size: int | None) -> Images:
    """Inspect every file once, before any work.

    Raises:
        InputError: no image is readable, or sizes differ and ``size`` is None.
    """
    digests: list[str | None] = []
    broken: dict[int, str] = {}
    sizes: dict[tuple[int, int], int] = {}  # height and width -> first row that has it
    each: list[tuple[int, int]] = []
    for row, file in enumerate(files):
        each.append((0, 0))
        if isinstance(file, Unreadable):
            digests.append(None)
            broken[row] = file.reason
            continue
        digests.append(hashlib.sha256(file).hexdigest())
        try:
            with open_upright(file) as image:
                each[row] = image.size
            sizes.setdefault(each[row], row)
        except Exception as error:  # decoders raise anything on damaged bytes
            broken[row] = _reason(error)
    if not sizes:
        listed = "\n  ".join(f"row {row}: {text}" for row, text in [*broken.items()][:5])
        raise InputError(f"{source}: none of {len(digests)} images can be read:\n  {listed}")
    if size is None and len(sizes) > 1:
        (first, start), (second, row) = list(sizes.items())[:2]
        raise InputError(
            f"{source}: images have {len(sizes)} sizes (row {start} is {first[1]} x {first[0]}, "
            f"row {row} is {second[1]} x {second[0]}); expected one. Name one with --size."
        )
    common = (size, size) if size is not None else next(iter(sizes))
    return Images(common, digests, broken, np.array(each, np.int64).reshape(-1, 2))


def images_fingerprint(digests: Iterable[str | None]) -> str:
    """sha256 over the digests; 32 zero bytes stand for a missing file."""
    return hashlib.sha256(b"".join(bytes.fromhex(d or "00" * 32) for d in digests)).hexdigest()


def image_to_codes(file: bytes | Unreadable, size: tuple[int, ...]) -> np.ndarray | Unreadable:
    """An encoded image -> RGB uint8 ``[3, H, W]``, or the reason why it cannot be read.

    Turned upright, transparency over white; an image of another size is resized to cover ``size``
    and cropped in the centre.
    """
    if isinstance(file, Unreadable):
        return file
    try:
        with open_upright(file) as opened:
            image = _rgb(opened.read())
    except Exception as error:  # decoders raise anything on damaged bytes
        return Unreadable(_reason(error))
    height, width = size
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


@dataclass(frozen=True)
class UprightImage:
    """An opened image file, seen upright.

    Attributes:
        size: height and width, from the header.
    """

    size: tuple[int, int]
    _image: Image.Image
    _turn: Image.Transpose | None

    def read(self) -> Image.Image:
        """The pixels.

        Raises:
            ValueError: they are of another size than the header says; decoders raise anything on
                damaged bytes.
        """
        self._image.load()
        turned = self._image if self._turn is None else self._image.transpose(self._turn)
        if (turned.height, turned.width) != self.size:
            raise ValueError(
                f"its header says {self.size[1]} x {self.size[0]} pixels, and it has "
                f"{turned.width} x {turned.height}"
            )
        return turned


@contextmanager
def open_upright(file: bytes) -> Iterator[UprightImage]:
    """Open an image file to see it upright, wherever its container writes the orientation: EXIF,
    XMP, and their text forms in PNG. Its pixels are decoded only when read.

    Raises:
        Exception: no image of a known format, or damaged; decoders raise anything.
    """
    with Image.open(io.BytesIO(file)) as image:
        if image.format == "PNG" and _has_late_texts(file):
            image.load()
        orientation, turned = orientation_of(image), False
        height, width = image.height, image.width
        if image.format == "TIFF":  # Pillow turns its pixels, and has swapped its sides already
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
            turned = exif_orientation(image) in TURNS
        size = (width, height) if orientation > 4 else (height, width)
        yield UprightImage(size, image, None if turned else TURNS.get(orientation))


def _has_late_texts(file: bytes) -> bool:
    """Whether a PNG has texts or EXIF behind its pixels: these are decoded to read them."""
    at, pixels = _PNG_START, False
    while at + 8 <= len(file):
        kind = file[at + 4 : at + 8]
        if pixels and kind in _PNG_TEXTS:
            return True
        pixels = pixels or kind == b"IDAT"
        at += 12 + int.from_bytes(file[at : at + 4], "big")
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow would clip its values at 255
        raise ValueError(f"pixels of mode {image.mode}; expected 8 bits per channel")
    has_alpha = image.palette is not None and image.palette.mode == "RGBA"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info or has_alpha:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    # For a file in memory Pillow names the object, with its address.
    known = "cannot identify image file"
    text = "no image of a known format" if known in str(error) else str(error)
    return f"{type(error).__name__}: {text}"
