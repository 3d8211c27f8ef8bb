"""A procedural world of captioned images with an exact judge.

Scenes hold one or two kinds of coloured shapes on a dark grey ground; captions say what is there in
several phrasings; an image is 18 x 18 pixels, a grid of 3 x 3 cells of 6 x 6, one object a cell.
Because the world is known exactly, a generated image can be judged skill by skill: how many, which
colours, which shapes, which colour on which shape, where, how big. Six of the thirty colour-shape
pairs are held out of training, so that composition can be told from memory.

Shapes: N images, 3 x 3 cells, 6 x 6 pixels a cell, 3 channels.
"""

import bisect
import functools
import io
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from ..schemas import InputError

GRID = 3
"""Cells along a side."""
CELL_PIXELS = 6
IMAGE_PIXELS = GRID * CELL_PIXELS
BACKGROUND = (48, 48, 48)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (240, 40, 40),
    "green": (40, 225, 60),
    "blue": (40, 90, 255),
    "yellow": (255, 225, 25),
    "purple": (225, 50, 240),
    "white": (255, 255, 255),
}
SIZES = ("small", "big")
# Bitmaps in the upper left 5 x 5 of a cell, so that neighbours never touch: big, then small.
_BITMAPS: dict[str, tuple[str, str]] = {
    "square": ("##### ##### ##### ##### #####", "..... .###. .###. .###. ....."),
    "triangle": ("..#.. .###. .###. ##### #####", "..... ..... ..#.. .###. ....."),
    "cross": ("..#.. ..#.. ##### ..#.. ..#..", "..... ..#.. .###. ..#.. ....."),
    "star": ("#.#.# .###. ##### .###. #.#.#", "..... .#.#. ..#.. .#.#. ....."),
    "moon": (".###. ##... ##... ##... .###.", "..... ..##. .#... ..##. ....."),
}
SHAPES = tuple(_BITMAPS)
HELD_OUT = frozenset(
    {
        ("red", "square"),
        ("green", "cross"),
        ("blue", "moon"),
        ("yellow", "triangle"),
        ("purple", "star"),
        ("white", "square"),
    }
)
"""Colour-shape pairs that no training scene contains: one of each colour, one or two of a shape."""
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Relation -> its phrasings. The first object stands in this relation to the second."""
KINDS: dict[str, float] = {"single": 0.1, "count": 0.3, "pair": 0.2, "relation": 0.2, "size": 0.2}
"""Kind of scene -> how often it is drawn."""
SKILLS = ("count", "colour", "shape", "binding", "relation", "size", "total", "all")
MAX_COUNT = 5

T = TypeVar("T")
Cell = tuple[int, int]
"""Row from the top and column from the left."""

_KIND_EDGES = tuple(itertools.accumulate(KINDS.values()))[:-1]
_SIZE_WORDS = {"small": ("small", "tiny"), "big": ("big", "large")}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five")
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_PAIRS = tuple(itertools.product(COLOURS, SHAPES))
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)
_HELD_OUT = tuple(pair for pair in _PAIRS if pair in HELD_OUT)


@dataclass(frozen=True)
class Object:
    """``count`` equal objects of a colour and a shape; with ``size`` None any size is right."""

    colour: str
    shape: str
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)
        _check("size", self.size, (None, *SIZES))
        _check("count", self.count, range(1, MAX_COUNT + 1))

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a caption asks for.

    ``kind`` is one of ``KINDS``: one object (``single``), a number of equal ones (``count``), or
    two objects that differ in colour and in shape: just both (``pair``), one in a ``relation`` to
    the other, or one big and one small (``size``).

    Raises:
        ValueError: the objects or the relation do not fit the kind.
    """

    kind: str
    objects: tuple[Object, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        _check("kind", self.kind, KINDS)
        _check("relation", self.relation, RELATIONS if self.kind == "relation" else (None,))
        expected = 1 if self.kind in ("single", "count") else 2
        if len(self.objects) != expected:
            raise ValueError(
                f"a scene of kind {self.kind!r} has {expected} entries in objects, "
                f"found {len(self.objects)}"
            )
        if self.kind != "count" and any(thing.count != 1 for thing in self.objects):
            raise ValueError(f"only kind 'count' may ask for several objects, found {self.kind!r}")
        if expected == 2:
            first, second = self.objects
            if first.colour == second.colour or first.shape == second.shape:
                raise ValueError(
                    f"two objects differ in colour and in shape, found {first.pair} and "
                    f"{second.pair}: choose others"
                )

    @property
    def held_out(self) -> bool:
        """Whether a held-out colour-shape pair occurs."""
        return any(thing.pair in HELD_OUT for thing in self.objects)

    @property
    def num_objects(self) -> int:
        """How many objects an image of the scene shows."""
        return sum(thing.count for thing in self.objects)

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-able document; ``from_dict`` reads it."""
        return {
            "kind": self.kind,
            "objects": [asdict(thing) for thing in self.objects],
            "relation": self.relation,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Scene":
        """The scene of a document of ``to_dict``; ValueError where it is not one."""
        try:
            objects = tuple(Object(**thing) for thing in document["objects"])
            return cls(document["kind"], objects, document.get("relation"))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{dict(document)!r} is not a scene ({error}); expected kind, objects, relation as "
                "Scene.to_dict writes them"
            ) from error

    def captions(self) -> tuple[str, ...]:
        """Every phrasing, each once, in a fixed order."""
        return _captions(self)

    def caption(self, rng: np.random.Generator) -> str:
        """One phrasing, all equally likely."""
        texts = self.captions()
        return texts[int(rng.integers(len(texts)))]


@dataclass(frozen=True)
class Detection:
    """An object that the judge found in the cell at ``row`` and ``column`` (0 = top, 0 = left).

    Colour, shape and size are None where something stands that is none of the world's objects.
    """

    colour: str | None
    shape: str | None
    size: str | None
    row: int
    column: int


@dataclass(frozen=True)
class WorldSummary:
    """What ``write_world`` wrote."""

    num_train_images: int
    num_train_captions: int
    num_test_captions: int
    """Of seen pairs; one image each."""
    num_held_out_captions: int
    """With a held-out pair; one image each."""

    def __str__(self) -> str:
        return (
            f"to train on: {self.num_train_images:,} images of {self.num_train_captions:,} "
            f"captions; to test on: {self.num_test_captions:,} other captions of the same pairs "
            f"of colour and shape, {self.num_held_out_captions:,} of held-out pairs"
        )


def sample_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """Draw a scene.

    Args:
        held_out: whether the scene contains at least one held-out colour-shape pair (True) or none.
    """
    kind = tuple(KINDS)[bisect.bisect(_KIND_EDGES, rng.random())]
    first = _choose(_HELD_OUT if held_out else _SEEN, rng)
    if kind in ("single", "count"):
        size = _choose([None, *SIZES], rng)
        count = int(rng.integers(1, MAX_COUNT + 1)) if kind == "count" else 1
        return Scene(kind, (Object(first[0], first[1], size, count),))
    others = [
        pair
        for pair in (_PAIRS if held_out else _SEEN)
        if pair[0] != first[0] and pair[1] != first[1]
    ]
    pairs = [first, _choose(others, rng)]
    sizes: list[str | None] = [None, None]
    if kind == "size":
        sizes = [str(size) for size in rng.permutation(SIZES)]
    if rng.random() < 0.5:
        pairs.reverse()  # else the held-out pair would always be named first
    objects = tuple(
        Object(colour, shape, size) for (colour, shape), size in zip(pairs, sizes, strict=True)
    )
    return Scene(kind, objects, _choose(tuple(RELATIONS), rng) if kind == "relation" else None)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw an image of the scene, [18, 18, 3] uint8 RGB.

    Objects stand in random cells, one a cell; a relation holds clearly: the objects are farther
    apart along its axis than across it. A size that the scene leaves open is drawn at random, one
    for all objects of a group.
    """
    num = scene.num_objects
    if scene.relation is None:
        cells = [divmod(int(cell), GRID) for cell in rng.permutation(GRID * GRID)[:num]]
    else:
        cells = list(_choose(_PLACEMENTS[scene.relation], rng))
    image = np.empty((IMAGE_PIXELS, IMAGE_PIXELS, 3), np.uint8)
    image[:] = BACKGROUND
    places = iter(cells)
    for thing in scene.objects:
        bitmap = _MASKS[thing.shape, thing.size or _choose(SIZES, rng)]
        for _ in range(thing.count):
            top, left = (CELL_PIXELS * place for place in next(places))
            window = image[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
            window[bitmap] = COLOURS[thing.colour]
    return image


def read_image(image: NDArray[np.uint8]) -> list[Detection]:
    """The objects in an image [18, 18, 3] uint8, row by row; see ``read_cells``."""
    cells = read_cells(np.asarray(image)[None])[0]
    return [
        Detection(*(_THINGS[code] if code >= 0 else _NOTHING), *place)
        for place, code in np.ndenumerate(cells)
        if code != EMPTY
    ]


def judge(image: NDArray[np.uint8], scene: Scene) -> dict[str, bool]:
    """Which skills an image [18, 18, 3] uint8 shows, of those that the scene asks for.

    See ``judge_cells`` for what each skill means.
    """
    return judge_cells(read_cells(np.asarray(image)[None])[0], scene)


EMPTY = -1
UNCLEAR = -2


def read_cells(images: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What stands in every cell of images [N, 18, 18, 3] uint8: codes [N, 3, 3] int8.

    A code is the index of one of the 60 objects, EMPTY, or UNCLEAR. The object (or empty ground)
    nearest in squared distance over the cell is chosen, which is the most likely one under Gaussian
    noise. It is UNCLEAR if what is left, averaged over the object's own pixels or over the ground
    around it, is more than noise of a fifth of the range leaves.

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
    cells = images.reshape(-1, GRID, CELL_PIXELS, GRID, CELL_PIXELS, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, CELL_PIXELS**2, 3)
    pixels = cells.astype(np.float32) / 255  # (N*9, 36, 3)
    templates, masks = _templates()  # (61, 36, 3), (61, 36)
    flat = templates.reshape(len(templates), -1)
    nearest = np.argmin((flat**2).sum(1) - 2 * pixels.reshape(len(pixels), -1) @ flat.T, axis=1)
    rest = ((pixels - templates[nearest]) ** 2).mean(-1)  # (N*9, 36)
    mask = masks[nearest]
    inside = (rest * mask).sum(1) / np.maximum(mask.sum(1), 1)
    outside = (rest * ~mask).sum(1) / (~mask).sum(1)
    codes = np.where(nearest == len(_THINGS), EMPTY, nearest)
    codes[(inside > _MAX_INSIDE) | (outside > _MAX_OUTSIDE)] = UNCLEAR
    return codes.astype(np.int8).reshape(-1, GRID, GRID)


def judge_cells(cells: NDArray[np.int8], scene: Scene) -> dict[str, bool]:
    """Judge codes [3, 3] of ``read_cells``: skill -> right, for the skills that the scene asks for.

    ``count``     scenes that ask for a number: as many objects as asked, whatever they are.
    ``colour``    the colours that occur are exactly those asked.
    ``shape``     the shapes that occur are exactly those asked.
    ``binding``   scenes of two objects: the colour-shape pairs that occur are exactly those asked.
    ``relation``  both objects occur once, and clearly in the relation asked.
    ``size``      scenes that ask for a size: the objects asked occur, all of them in their size.
    ``total``     as many objects as asked, in every scene.
    ``all``       everything that was asked is right, and nothing else is there.
    """
    found = [
        (*(_THINGS[code] if code >= 0 else _NOTHING), place)
        for place, code in np.ndenumerate(cells)
        if code != EMPTY
    ]
    pairs = Counter((colour, shape) for colour, shape, _, _ in found)
    total = len(found) == scene.num_objects
    skills = {
        "colour": {entry[0] for entry in found} == {thing.colour for thing in scene.objects},
        "shape": {entry[1] for entry in found} == {thing.shape for thing in scene.objects},
        "total": total,
    }
    if scene.kind == "count":
        skills["count"] = total
    if len(scene.objects) > 1:
        skills["binding"] = set(pairs) == {thing.pair for thing in scene.objects}
    if any(thing.size for thing in scene.objects):
        skills["size"] = all(
            {entry[2] for entry in found if entry[:2] == thing.pair} == {thing.size}
            for thing in scene.objects
        )
    if scene.relation is not None:
        places = [
            [entry[3] for entry in found if entry[:2] == thing.pair] for thing in scene.objects
        ]
        skills["relation"] = all(len(place) == 1 for place in places) and (
            (places[0][0], places[1][0]) in _PLACEMENTS[scene.relation]
        )
    wanted = Counter({thing.pair: thing.count for thing in scene.objects})
    skills["all"] = pairs == wanted and all(skills.values())
    return {skill: skills[skill] for skill in SKILLS if skill in skills}


def write_world(
    out: str | Path,
    num: int,
    seed: int,
    images_per_caption: int = 4,
    num_test: int = 1000,
    progress: bool = True,
) -> WorldSummary:
    """Write ``out/train.parquet`` and ``out/test.parquet``.

    A row is an image: ``text``, ``image`` (struct of PNG ``bytes`` and ``path``, as Hugging Face
    datasets stores images), ``scene`` (JSON of ``Scene.to_dict``) and ``split``: ``train``,
    ``test`` (pairs of colour and shape that training shows, captions that it does not) or
    ``held-out`` (captions with a pair that training never shows). No caption of the test file
    occurs in the training file. The same arguments give the same rows.

    Args:
        out: a folder that does not exist yet, or is empty; it appears only when it is complete.
        num: images in the training file, a multiple of ``images_per_caption``.
        images_per_caption: images of each training caption, differing in what it leaves open.
        num_test: rows of the test file, an even number: half ``test``, half ``held-out``.

    Raises:
        InputError: ``out`` holds something, the numbers do not divide, or the world has fewer
            captions than asked for.
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
    rng = np.random.default_rng(seed)
    taken: set[str] = set()
    held_out = list(_new_captions(num_test // 2, True, taken, rng))
    test = list(_new_captions(num_test // 2, False, taken, rng))
    train = list(_new_captions(num // images_per_caption, False, taken, rng))
    rows = [(text, scene, "train") for text, scene in train for _ in range(images_per_caption)]
    test_rows = [(text, scene, "test") for text, scene in test]
    test_rows += [(text, scene, "held-out") for text, scene in held_out]

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        partial.chmod(0o755)  # mkdtemp makes it private
        with tqdm(total=num + num_test, unit="image", disable=not progress) as bar:
            for name, part in (("train", rows), ("test", test_rows)):
                pq.write_table(_table(name, part, rng, bar), partial / f"{name}.parquet")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return WorldSummary(num, len(train), len(test), len(held_out))


def read_scenes(table: pa.Table) -> list[Scene]:
    """The scenes of a table of ``write_world``, row by row, from its column ``scene``."""
    return [Scene.from_dict(json.loads(text)) for text in table.column("scene").to_pylist()]


def _new_captions(
    num: int, held_out: bool, taken: set[str], rng: np.random.Generator
) -> Iterator[tuple[str, Scene]]:
    """Draw ``num`` captions that are not in ``taken`` and add them to it."""
    for drawn in range(num):
        for _ in range(200):
            scene = sample_scene(rng, held_out)
            text = scene.caption(rng)
            if text not in taken:
                break
        else:
            raise InputError(
                f"found only {drawn} new captions {'with' if held_out else 'without'} held-out "
                f"pairs, expected {num}: ask for fewer, or for more images a caption"
            )
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


@functools.lru_cache(maxsize=4096)
def _captions(scene: Scene) -> tuple[str, ...]:
    if scene.kind == "single":
        bodies = [f"a {noun}" for noun in _nouns(scene.objects[0])]
    elif scene.kind == "count":
        count = scene.objects[0].count
        bodies = [
            f"{number} {noun}"
            for number in (_NUMBER_WORDS[count], str(count), f"exactly {_NUMBER_WORDS[count]}")
            for noun in _nouns(scene.objects[0])
        ]
    else:
        links = RELATIONS[scene.relation] if scene.relation else ("and", "together with")
        bodies = [
            f"a {first} {link} a {second}"
            for link in links
            for first, second in zip(*map(_nouns, scene.objects), strict=True)
        ]
    there = "there are" if scene.kind == "count" and scene.num_objects > 1 else "there is"
    leads = ("", "a picture of ", "an image with ", f"{there} ", "this image shows ", "we see ")
    return tuple(dict.fromkeys(lead + body for lead in leads for body in bodies))


def _nouns(thing: Object) -> tuple[str, ...]:
    """Phrases for an object without its article: ``big red square`` and the like."""
    shape = thing.shape if thing.count == 1 else _PLURALS[thing.shape]
    words = _SIZE_WORDS[thing.size] if thing.size else ("",)
    return tuple(f"{word} {thing.colour} {shape}".strip() for word in words)


def _choose(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _check(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown, expected one of {list(known)}")


def _mask(text: str) -> NDArray[np.bool_]:
    """[6, 6] from five words of five characters."""
    mask = np.zeros((CELL_PIXELS, CELL_PIXELS), bool)
    mask[:5, :5] = [[mark == "#" for mark in line] for line in text.split()]
    return mask


_MASKS = {
    (shape, size): _mask(text)
    for shape, (big, small) in _BITMAPS.items()
    for size, text in (("big", big), ("small", small))
}
_NOTHING = (None, None, None)
_THINGS = tuple(itertools.product(COLOURS, SHAPES, SIZES))
"""Code of ``read_cells`` -> colour, shape, size."""
# Noise of sigma 0.2 leaves a mean square of 0.04; over an object of four pixels, up to three times.
_MAX_INSIDE = 0.13
_MAX_OUTSIDE = 0.09


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Every object and, last, empty ground: cells (61, 36, 3) in [0, 1], own pixels (61, 36)."""
    masks = [_MASKS[shape, size] for _, shape, size in _THINGS]
    masks.append(np.zeros_like(masks[0]))
    colours = [COLOURS[colour] for colour, _, _ in _THINGS] + [BACKGROUND]
    mask = np.stack(masks).reshape(len(masks), -1)
    cells = np.where(mask[..., None], np.array(colours)[:, None], np.array(BACKGROUND))
    return (cells / 255).astype(np.float32), mask


def _placements(relation: str) -> tuple[tuple[Cell, Cell], ...]:
    """Every (row, column) of the first and of the second object that shows the relation clearly."""
    cells: list[Cell] = list(itertools.product(range(GRID), range(GRID)))
    pairs: list[tuple[Cell, Cell]] = []
    for first, second in itertools.product(cells, cells):
        down, right = first[0] - second[0], first[1] - second[1]
        along, across = (right, down) if relation in ("left of", "right of") else (down, right)
        sign = -1 if relation in ("left of", "above") else 1
        if along * sign > abs(across):
            pairs.append((first, second))
    return tuple(pairs)


_PLACEMENTS = {relation: _placements(relation) for relation in RELATIONS}
