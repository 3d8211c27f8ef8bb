"""Scenes of the world of shapes, and the captions that ask for them.

A scene is one object, several equal ones, or two objects or groups in some relation. Sentences name
colours, shapes, numbers, sizes and relations in many ways; in some of them (``a square and a ring,
red and blue respectively``; ``a ring with a square above it``) the position of a word alone does
not give its meaning. A quarter of the pairs of colour and shape is held out of training, to
distinguish composition from memory.
"""

import bisect
import functools
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, TypeVar

import numpy as np

COLOURS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue",),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "grey": ("grey", "gray"),
    "cyan": ("cyan", "turquoise"),
}
"""Colour -> words for it."""
SHAPES: dict[str, tuple[str, ...]] = {
    "square": ("square",),
    "triangle": ("triangle",),
    "cross": ("cross", "plus sign"),
    "star": ("star",),
    "moon": ("moon", "crescent"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "arch": ("arch", "gateway"),
}
"""Shape -> words for it."""
SIZES: dict[str, tuple[str, ...]] = {"small": ("small", "tiny"), "big": ("big", "large")}
"""Size -> words for it."""
NUMBERS: dict[int, tuple[str, ...]] = {
    1: ("one", "1", "exactly one", "a single"),
    2: ("two", "2", "exactly two", "a pair of"),
    3: ("three", "3", "exactly three", "a trio of"),
    4: ("four", "4", "exactly four"),
    5: ("five", "5", "exactly five"),
}
"""Count -> words for it."""
RELATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "left of": (("left of", "to the left of"), "to its left"),
    "right of": (("right of", "to the right of"), "to its right"),
    "above": (("above", "over"), "above it"),
    "below": (("below", "under"), "below it"),
    "next to": (("next to", "beside"), "beside it"),
    "far from": (("far from", "far away from"), "far away from it"),
}
"""Relation -> words between the first and the second object; words after ``second with first``."""
_REVERSED = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
"""Relation of the second object to the first, where it is another one."""
KINDS: dict[str, float] = {
    "single": 0.05,
    "count": 0.25,
    "pair": 0.15,
    "relation": 0.2,
    "size": 0.15,
    "groups": 0.2,
}
"""Kind of scene -> its share of all scenes."""
MAX_COUNT = max(NUMBERS)
MAX_GROUP = 4
"""Most objects per group of two: both groups fit into nine cells."""
HELD_OUT = frozenset(
    (colour, tuple(SHAPES)[(number + shift) % len(SHAPES)])
    for number, colour in enumerate(COLOURS)
    for shift in (0, 3)
)
"""Colour-shape pairs that no training scene contains: two per colour, and two per shape."""

T = TypeVar("T")

_KIND_EDGES = tuple(itertools.accumulate(KINDS.values()))[:-1]
_PAIRS = tuple(itertools.product(COLOURS, SHAPES))
_SEEN = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)
_HELD_OUT = tuple(pair for pair in _PAIRS if pair in HELD_OUT)
_SINGULAR, _PLURAL = "there is ", "there are "


@dataclass(frozen=True)
class Object:
    """``count`` equal objects of one colour and shape; with ``size`` None, any size is right."""

    colour: str
    shape: str
    size: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        _check("colour", self.colour, COLOURS)
        _check("shape", self.shape, SHAPES)
        _check("size", self.size, (None, *SIZES))
        _check("count", self.count, NUMBERS)

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """The content of a caption.

    ``kind`` is one of ``KINDS``: one object (``single``), a number of equal ones (``count``), or
    two objects that differ in colour and in shape: just these (``pair``), one in a ``relation`` to
    the other, one big and one small (``size``), or a number of each (``groups``).

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
        counts = [thing.count for thing in self.objects]
        if self.kind not in ("count", "groups") and max(counts) > 1:
            raise ValueError(
                f"only kinds 'count' and 'groups' may ask for several objects, found {self.kind!r}"
            )
        if self.kind == "groups" and not 1 < max(counts) <= MAX_GROUP:
            raise ValueError(f"groups are of up to {MAX_GROUP}, one above 1, found {counts}")
        if expected == 2:
            first, second = self.objects
            if first.colour == second.colour or first.shape == second.shape:
                raise ValueError(
                    f"two objects differ in colour and in shape, found {first.pair} and "
                    f"{second.pair}: choose others"
                )

    @property
    def held_out(self) -> bool:
        """True where a held-out colour-shape pair occurs."""
        return any(thing.pair in HELD_OUT for thing in self.objects)

    @property
    def num_objects(self) -> int:
        """Number of objects that an image of the scene shows."""
        return sum(thing.count for thing in self.objects)

    def to_dict(self) -> dict[str, Any]:
        """A document for JSON; :meth:`from_dict` reads it."""
        return {
            "kind": self.kind,
            "objects": [asdict(thing) for thing in self.objects],
            "relation": self.relation,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Scene":
        """The scene of a document from :meth:`to_dict`.

        Raises:
            ValueError: not such a document.
        """
        try:
            objects = tuple(Object(**thing) for thing in document["objects"])
            return cls(document["kind"], objects, document.get("relation"))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{document!r} is not a scene ({error}); expected kind, objects, relation as "
                "Scene.to_dict writes them"
            ) from error

    @property
    def content(self) -> str:
        """What an image of the scene shows, as a text: equal for scenes whose images are judged
        alike, such as a square left of a ring and a ring right of a square."""
        objects = [":".join(map(str, astuple(thing))) for thing in self.objects]
        relation = self.relation
        if objects != sorted(objects):
            objects.reverse()
            relation = _REVERSED.get(str(relation), relation)
        return " ".join([self.kind, *objects, *filter(None, [relation])])

    def captions(self) -> tuple[str, ...]:
        """All phrasings, each once, in a fixed order."""
        return _captions(self)

    def caption(self, rng: np.random.Generator) -> str:
        """One phrasing, all equally likely."""
        return choose(self.captions(), rng)


def sample_scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A random scene.

    Args:
        held_out: True for a scene with at least one held-out colour-shape pair, False for none.
    """
    kind = tuple(KINDS)[bisect.bisect(_KIND_EDGES, rng.random())]
    first = choose(_HELD_OUT if held_out else _SEEN, rng)
    if kind in ("single", "count"):
        size = choose([None, *SIZES], rng)
        count = int(rng.integers(1, MAX_COUNT + 1)) if kind == "count" else 1
        return Scene(kind, (Object(first[0], first[1], size, count),))
    others = [
        pair
        for pair in (_PAIRS if held_out else _SEEN)
        if pair[0] != first[0] and pair[1] != first[1]
    ]
    pairs = [first, choose(others, rng)]
    sizes: list[str | None] = [None, None]
    counts = [1, 1]
    if kind == "size":
        sizes = [str(size) for size in rng.permutation([*SIZES])]
    while kind == "groups" and max(counts) == 1:
        counts = [int(count) for count in rng.integers(1, MAX_GROUP + 1, 2)]
    if rng.random() < 0.5:
        pairs.reverse()  # otherwise the held-out pair would always be named first
    objects = tuple(
        Object(colour, shape, size, count)
        for (colour, shape), size, count in zip(pairs, sizes, counts, strict=True)
    )
    return Scene(kind, objects, choose(tuple(RELATIONS), rng) if kind == "relation" else None)


def split_of(scene: Scene) -> str:
    """The split that a scene without held-out pairs belongs to, in every dataset: ``test`` has a
    fifth of all scenes, ``dev`` a tenth, ``train`` the others."""
    number = zlib.crc32(scene.content.encode()) % 10
    return {0: "test", 1: "test", 2: "dev"}.get(number, "train")


def choose(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


# ------------------------------------------------------------------------------------ phrasing


@functools.lru_cache(maxsize=4096)
def _captions(scene: Scene) -> tuple[str, ...]:
    several = scene.objects[0].count > 1
    leads = (
        "",
        "a picture of ",
        "an image with ",
        _PLURAL if several else _SINGULAR,
        "this image shows ",
        "we see ",
    )
    return tuple(dict.fromkeys(lead + body for lead in leads for body in _bodies(scene)))


def _bodies(scene: Scene) -> Iterator[str]:
    """Descriptions of the objects, without a lead."""
    if len(scene.objects) == 1:
        yield from _groups(scene.objects[0], numbered=scene.kind == "count")
        return
    first, second = scene.objects
    pairs = [
        *itertools.product(
            *(_groups(thing, numbered=scene.kind == "groups") for thing in scene.objects)
        )
    ]
    if scene.relation is not None:
        between, after = RELATIONS[scene.relation]
        for one, other in pairs:
            yield from (f"{one} {link} {other}" for link in between)
            yield f"{other} with {one} {after}"
        return
    for one, other in pairs:
        yield f"{one} and {other}"
        yield f"{one} together with {other}"
    if scene.kind == "pair":
        for (a, b), (x, y) in itertools.product(
            itertools.product(SHAPES[first.shape], SHAPES[second.shape]),
            itertools.product(COLOURS[first.colour], COLOURS[second.colour]),
        ):
            yield f"{_article(a)} and {_article(b)}, {x} and {y} respectively"


def _groups(thing: Object, *, numbered: bool) -> Iterator[str]:
    """Phrases for equal objects: ``two big red squares`` and the like."""
    for size, colour, word in itertools.product(
        SIZES[thing.size] if thing.size else ("",), COLOURS[thing.colour], SHAPES[thing.shape]
    ):
        shape = word if thing.count == 1 else _plural(word)
        if not numbered:
            yield _article(f"{size} {colour} {shape}".strip())
            yield f"{_article(f'{size} {shape}'.strip())} that is {colour}"
            continue
        for number in NUMBERS[thing.count]:
            yield " ".join(filter(None, (number, size, colour, shape)))
        verb = "is" if thing.count == 1 else "are"
        plain = " ".join(filter(None, (NUMBERS[thing.count][0], size, shape)))
        yield f"{plain} that {verb} {colour}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"


def _check(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown, expected one of {list(known)}")
