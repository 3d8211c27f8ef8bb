"""Grids of generated images."""

import io
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from PIL import Image

from ...pipeline.style import DPI, INK, Figure, plain
from ...schemas import InputError, write_document, write_whole
from ...schemas.json_file import load_json

RIGHT, WRONG = "#1b8a5a", "#c8553d"
_IMAGE = re.compile(r"[0-9]{6}\.png")
CAPTIONS = "captions.jsonl"
"""List of a folder of images: one line per image, with its file and its caption."""


def sample_grid(
    images: NDArray[np.uint8],
    captions: Sequence[str],
    marks: Sequence[bool] | None = None,
    *,
    columns: int = 6,
) -> Figure:
    """Images above their captions, enlarged without interpolation.

    Args:
        images: [N, height, width, 3] uint8.
        marks: True for images that are right, which get a green tick and frame; otherwise a red
            cross and frame.

    Raises:
        InputError: no images, or not one caption (and mark) per image.
    """
    lengths = {len(images), len(captions), len(images if marks is None else marks)}
    if len(lengths) > 1 or not len(images):
        raise InputError(
            f"found {len(images)} images, {len(captions)} captions and "
            f"{'no' if marks is None else len(marks)} marks, expected one of each per image"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    wrapped = [[plain(line) for line in textwrap.wrap(caption, 24)] or [""] for caption in captions]
    lines = max(map(len, wrapped))
    figure = Figure(
        figsize=(1.75 * columns + 0.1, (1.75 + 0.15 * lines) * rows + 0.1),
        layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08),
    )
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(images) :]:
        axes.set_visible(False)
    for number, (axes, image, text) in enumerate(zip(panels.flat, images, wrapped, strict=False)):
        axes.imshow(image, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        padded = text + [""] * (lines - len(text))  # all rows of panels are equally high
        axes.set_xlabel("\n".join(padded), fontsize=8, color=INK, labelpad=3)
        axes.spines[:].set_visible(False)
        if marks is not None:
            colour = RIGHT if marks[number] else WRONG
            axes.spines[:].set(visible=True, color=colour, linewidth=2)
            axes.text(
                1.0,
                1.0,
                "✓" if marks[number] else "✗",
                transform=axes.transAxes,
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold",
                color="white",
                bbox={"boxstyle": "circle,pad=0.15", "facecolor": colour, "edgecolor": "none"},
            )
    return figure


def save_images(
    out: Path, images: NDArray[np.uint8], captions: Sequence[str], grid: Figure
) -> list[Path]:
    """Write one PNG per image, the list ``captions.jsonl``, and the grid of all images.

    Args:
        images: uint8 [N, height, width, 3].
        grid: from :func:`sample_grid`.

    Returns:
        Paths of the grid and of the list.
    """
    out.mkdir(parents=True, exist_ok=True)
    list_path = out / CAPTIONS
    for _, earlier in list_images(out):  # of which there may be more
        earlier.unlink(missing_ok=True)
    lines = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        name = f"{number:06d}.png"
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        write_whole(out / name, content.getvalue())
        lines.append(json.dumps({"image": name, "caption": caption}, ensure_ascii=False))
    write_document(list_path, "".join(f"{line}\n" for line in lines))
    grid.savefig(out / "grid.png", dpi=DPI)
    return [out / "grid.png", list_path]


def list_images(folder: Path) -> list[tuple[str, Path]]:
    """Caption and file of each image that :func:`save_images` wrote; none without a list.

    Raises:
        InputError: the list is damaged.
    """
    listed = folder / CAPTIONS
    if not listed.is_file():
        return []
    try:
        lines = [*filter(None, listed.read_bytes().decode("utf-8").split("\n"))]
    except UnicodeDecodeError as error:
        raise InputError(f"{listed} is damaged: {error}; write the images again") from error
    images = []
    for line in lines:  # not by splitlines: a caption may hold other line breaks
        entry = load_json(line, str(listed))
        match entry:
            case {"image": str(name), "caption": str(caption)} if _IMAGE.fullmatch(name):
                images.append((caption, folder / name))
            case _:
                raise InputError(f"{listed} is damaged at {line[:80]!r}: write the images again")
    return images
