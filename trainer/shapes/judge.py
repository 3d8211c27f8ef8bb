"""An exact judge of images of the world of shapes.

Shapes: N images of 3 x 3 cells, each of 36 pixels with 3 channels; 129 templates, of the 128
objects and of empty ground.
"""

import functools
import itertools
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from ...schemas import InputError
from .images import BACKGROUND, BITMAPS, CELL_PIXELS, GRID, IMAGE_PIXELS, MASKS, PLACEMENTS, RGB
from .scenes import COLOURS, SIZES, Scene

SKILLS = ("count", "groups", "colour", "shape", "binding", "relation", "size", "total", "all")


def judge(image: NDArray[np.uint8], scene: Scene) -> dict[str, bool]:
    """Skill -> right, of an image [18, 18, 3] uint8, for the skills that the scene asks for.

    :func:`judge_cells` explains the skills.
    """
    return judge_cells(read_cells(np.asarray(image)[None])[0], scene)


EMPTY = -1
"""Code of empty ground."""
UNCLEAR = -2
"""Code of a cell that is neither an object nor empty."""


def read_cells(images: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The object in every cell of images [N, 18, 18, 3] uint8: codes [N, 3, 3] int8.

    A code is the index of one of the 128 objects, EMPTY, or UNCLEAR. It is the object (or empty
    ground) with the smallest squared distance over the cell, the most likely one under Gaussian
    noise. A cell is UNCLEAR if the mean squared error, over the object's own pixels or over the
    ground around it, exceeds what noise of a fifth of the range leaves.

    Raises:
        InputError: the images are not uint8 or not [N, 18, 18, 3].
    """
    images = np.asarray(images)
    expected = (IMAGE_PIXELS, IMAGE_PIXELS, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        raise InputError(
            f"found images {images.dtype} {list(images.shape)}, expected uint8 "
            f"[N, {IMAGE_PIXELS}, {IMAGE_PIXELS}, 3]: decode to RGB bytes first"
        )
    # Rows of pixels, [N, 3, 6, 3, 6, 3] -> cells, [N, 3, 3, 6, 6, 3] -> [N*9, 36, 3].
    cells = images.reshape(-1, GRID, CELL_PIXELS, GRID, CELL_PIXELS, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, CELL_PIXELS**2, 3)
    pixels = cells.astype(np.float32) / 255  # [N*9, 36, 3]
    templates, masks = _templates()  # [129, 36, 3], [129, 36]
    flat = templates.reshape(len(templates), -1)  # [129, 108]
    # |pixels - template|^2 without |pixels|^2, which all templates share.
    nearest = np.argmin((flat**2).sum(1) - 2 * pixels.reshape(len(pixels), -1) @ flat.T, axis=1)
    error = ((pixels - templates[nearest]) ** 2).mean(-1)  # [N*9, 36]
    mask = masks[nearest]  # [N*9, 36]
    inside = (error * mask).sum(1) / np.maximum(mask.sum(1), 1)  # [N*9]
    outside = (error * ~mask).sum(1) / (~mask).sum(1)  # [N*9]
    codes = np.where(nearest == len(_THINGS), EMPTY, nearest)
    codes[(inside > _MAX_INSIDE) | (outside > _MAX_OUTSIDE)] = UNCLEAR
    return codes.astype(np.int8).reshape(-1, GRID, GRID)


def judge_cells(cells: NDArray[np.int8], scene: Scene) -> dict[str, bool]:
    """Skill -> right, of codes [3, 3] from ``read_cells``, for the skills that the scene asks for.

    ``count``     scenes that ask for one number: as many objects as asked for, whatever they are.
    ``groups``    scenes of two groups: of each colour-shape pair as many as asked for.
    ``colour``    the colours that occur are exactly those asked for.
    ``shape``     the shapes that occur are exactly those asked for.
    ``binding``   scenes of two objects: the colour-shape pairs are exactly those asked for.
    ``relation``  both objects occur once, clearly in the relation asked for: farther apart along
                  its axis than across it; ``next to`` with a common edge, ``far from`` with a row
                  or a column between them.
    ``size``      scenes that ask for a size: the objects asked for occur, all in their size.
    ``total``     as many objects as asked for, in every scene.
    ``all``       everything that was asked for is right, and nothing else is there.
    """
    seen = [
        (*(_THINGS[code] if code >= 0 else _NOTHING), cell)
        for cell, code in np.ndenumerate(cells)
        if code != EMPTY
    ]
    pairs = Counter((colour, shape) for colour, shape, _, _ in seen)
    total = len(seen) == scene.num_objects
    skills = {
        "colour": {colour for colour, _, _, _ in seen} == {each.colour for each in scene.objects},
        "shape": {shape for _, shape, _, _ in seen} == {each.shape for each in scene.objects},
        "total": total,
    }
    if scene.kind == "count":
        skills["count"] = total
    if len(scene.objects) > 1:
        skills["binding"] = set(pairs) == {thing.pair for thing in scene.objects}
    if any(thing.size for thing in scene.objects):
        skills["size"] = all(
            {size for *pair, size, _ in seen if tuple(pair) == thing.pair} == {thing.size}
            for thing in scene.objects
        )
    if scene.kind == "groups":
        skills["groups"] = all(pairs[thing.pair] == thing.count for thing in scene.objects)
    if scene.relation is not None:
        first, second = (
            [cell for *pair, _, cell in seen if tuple(pair) == thing.pair]
            for thing in scene.objects
        )
        skills["relation"] = (
            len(first) == len(second) == 1 and (first[0], second[0]) in PLACEMENTS[scene.relation]
        )
    wanted = Counter({thing.pair: thing.count for thing in scene.objects})
    skills["all"] = pairs == wanted and all(skills.values())
    return {skill: skills[skill] for skill in SKILLS if skill in skills}


_NOTHING = (None, None, None)
_THINGS = tuple(itertools.product(COLOURS, BITMAPS, SIZES))
"""Code of ``read_cells`` -> colour, shape, size."""
# Noise of sigma 0.2 leaves a mean square of 0.04; over an object of four pixels, up to three times.
_MAX_INSIDE = 0.13
_MAX_OUTSIDE = 0.09


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """All objects and, last, empty ground: cells [129, 36, 3] in [0, 1], and masks of the objects'
    own pixels [129, 36]."""
    masks = [MASKS[shape, size] for _, shape, size in _THINGS]
    masks.append(np.zeros_like(masks[0]))
    colours = [RGB[colour] for colour, _, _ in _THINGS] + [BACKGROUND]
    mask = np.stack(masks).reshape(len(masks), -1)
    cells = np.where(mask[..., None], np.array(colours)[:, None], np.array(BACKGROUND))
    return (cells / 255).astype(np.float32), mask
