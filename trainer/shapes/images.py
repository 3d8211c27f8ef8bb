"""Images of the world of shapes.

An image is 18 x 18 pixels: a dark grey ground, 3 x 3 cells of 6 x 6 pixels, at most one object per
cell. Because the world is known exactly, a generated image can be scored skill by skill (see
:mod:`.judge`): how many, which colours, which shapes, which colour on which shape, where, how big.

Shapes: 3 x 3 cells, 6 x 6 pixels per cell, 3 channels.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

from .scenes import RELATIONS, SIZES, Scene, choose

GRID = 3
"""Cells along a side."""
CELL_PIXELS = 6
IMAGE_PIXELS = GRID * CELL_PIXELS
BACKGROUND = (40, 40, 40)
RGB: dict[str, tuple[int, int, int]] = {
    "red": (240, 40, 40),
    "green": (40, 225, 60),
    "blue": (40, 90, 255),
    "yellow": (255, 225, 25),
    "purple": (225, 50, 240),
    "white": (255, 255, 255),
    "grey": (148, 148, 148),
    "cyan": (40, 225, 240),
}
# Bitmaps in the upper left 5 x 5 of a cell, so that neighbours never touch: big, then small.
BITMAPS: dict[str, tuple[str, str]] = {
    "square": ("##### ##### ##### ##### #####", "..... .##.. .##.. ..... ....."),
    "triangle": ("..#.. .###. .###. ##### #####", "..... ..... ..#.. .###. ....."),
    "cross": ("..#.. ..#.. ##### ..#.. ..#..", "..... ..#.. .###. ..#.. ....."),
    "star": ("#.#.# .###. ##### .###. #.#.#", "..... .#.#. ..#.. .#.#. ....."),
    "moon": (".###. ##... ##... ##... .###.", "..... ..##. .#... ..##. ....."),
    "ring": (".###. #...# #...# #...# .###.", "..... .###. .#.#. .###. ....."),
    "heart": (".#.#. ##### ##### .###. ..#..", "..... .#.#. .###. ..#.. ....."),
    "arch": ("##### ##### #...# #...# #...#", "..... .###. .#.#. ..... ....."),
}

Cell = tuple[int, int]
"""Row from the top and column from the left."""


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image of the scene: [18, 18, 3] uint8 RGB.

    Objects are in random cells, one per cell; a relation holds clearly (see ``judge_cells``). A
    size that the scene leaves open is chosen at random, the same for all objects of a group.
    """
    num = scene.num_objects
    if scene.relation is None:
        cells = [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[:num]]
    else:
        cells = list(choose(PLACEMENTS[scene.relation], rng))
    image = np.empty((IMAGE_PIXELS, IMAGE_PIXELS, 3), np.uint8)
    image[:] = BACKGROUND
    free = iter(cells)
    for thing in scene.objects:
        bitmap = MASKS[thing.shape, thing.size or choose(tuple(SIZES), rng)]
        for _ in range(thing.count):
            top, left = (CELL_PIXELS * index for index in next(free))
            window = image[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
            window[bitmap] = RGB[thing.colour]
    return image


def _mask(text: str) -> NDArray[np.bool_]:
    """A bitmap, five words of five characters, as a mask [6, 6]."""
    mask = np.zeros((CELL_PIXELS, CELL_PIXELS), bool)
    mask[:5, :5] = [[mark == "#" for mark in line] for line in text.split()]
    return mask


MASKS = {
    (shape, size): _mask(text)
    for shape, (big, small) in BITMAPS.items()
    for size, text in (("big", big), ("small", small))
}


def _placements(relation: str) -> tuple[tuple[Cell, Cell], ...]:
    """All pairs of cells, of the first and the second object, that show the relation clearly."""
    cells: list[Cell] = list(itertools.product(range(GRID), range(GRID)))
    pairs: list[tuple[Cell, Cell]] = []
    for first, second in itertools.product(cells, cells):
        down, right = first[0] - second[0], first[1] - second[1]
        shows = {
            "left of": -right > abs(down),
            "right of": right > abs(down),
            "above": -down > abs(right),
            "below": down > abs(right),
            "next to": abs(down) + abs(right) == 1,
            "far from": max(abs(down), abs(right)) == GRID - 1,
        }
        if shows[relation]:
            pairs.append((first, second))
    return tuple(pairs)


PLACEMENTS = {relation: _placements(relation) for relation in RELATIONS}
