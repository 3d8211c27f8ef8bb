"""Which columns of a source hold captions and images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from ...schemas import InputError

TEXT_COLUMNS = ("text", "prompt", "caption")
"""The first of them that exists holds the captions."""
MORE_TEXT_COLUMNS = ("TEXT",)
"""Looked for where none of these exists; only one may."""
IMAGE_COLUMNS = ("image",)
MORE_IMAGE_COLUMNS = ("jpg", "png", "file_name", "image_path", "image_binary")
RARE_IMAGE_COLUMNS = ("img_path", "image_file", "image_name", "filename", "jpeg", "webp")
"""Looked for where none of the others exists; only one may. No URLs: nothing is downloaded unless
the user names the column."""
_MAY_BE_IMAGES = ("image", "img", "photo", "picture", "jpg", "jpeg", "png", "webp", "file", "url")
_NUM_CANDIDATES = 12


@dataclass(frozen=True)
class Chosen:
    """Columns that were chosen.

    Attributes:
        texts: of captions; several give a sample several captions. Empty: there is none.
        weights: of each of them, or None.
        fallback: whose captions stand in where the others have none.
        image: of images, or None.
        others: columns with captions by their names that were not chosen.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...] | None
    fallback: str | None
    image: str | None
    others: tuple[str, ...]

    @property
    def text(self) -> str | None:
        """Name of the captions, for messages."""
        return ", ".join(self.texts) or None

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        every = (*self.texts, self.fallback, self.image)
        return [*dict.fromkeys(name for name in every if name is not None)]

    def describe(self) -> str:
        """What was chosen, in words."""
        named = [repr(name) for name in self.texts]
        if self.weights is not None:
            named = [f"{n} (weight {w:g})" for n, w in zip(named, self.weights, strict=True)]
        text = f"captions from {' and '.join(named)}" if named else "no captions"
        if self.fallback is not None:
            text += f", or else {self.fallback!r}"
        if self.others:
            text += f" (not from {', '.join(map(repr, self.others))})"
        return text if self.image is None else f"{text}; images from {self.image!r}"


@dataclass(frozen=True)
class Columns:
    """The columns of a source.

    Attributes:
        source: as the user named it.
        names: of all columns.
        has: whether there is a column of this name, which may have dots.
        candidates: gives names of columns that may be captions.
        text_defaults: names that captions have, the first that exists being chosen.
        is_old: whether it is of a form whose further columns early versions did not look for:
            then they are looked for only where the column needed has none of the old names, so that
            stores of the source keep their identity.
        one_default: whether several of the default names are a question for the user.
    """

    source: str
    names: Sequence[str]
    has: Callable[[str], bool]
    candidates: Callable[[], list[str]]
    text_defaults: Sequence[str] = TEXT_COLUMNS
    is_old: bool = True
    one_default: bool = False

    def choose(
        self,
        text: str | Sequence[str] | None,
        image: str | None,
        fallback: str | None,
        need: str,
    ) -> Chosen:
        """Choose the columns of captions and images.

        Args:
            text: names, each of which may end in ``=`` and a weight.
            need: ``"text"`` or ``"image"``: the column that must exist.

        Raises:
            InputError: no such column, or several of which none is the obvious one.
        """
        wanted = (text,) if isinstance(text, str) else tuple(text or ())
        texts, weights = self._weighted(wanted)
        settled = {
            "text": bool(texts) or any(map(self.has, self.text_defaults)),
            "image": image is not None or any(map(self.has, IMAGE_COLUMNS)),
        }[need]
        only_old = settled and self.is_old
        if not texts:
            first: Sequence[str] = () if self.one_default else self.text_defaults
            rest: tuple[str, ...] = () if only_old and need != "text" else MORE_TEXT_COLUMNS
            rest = (*self.text_defaults, *rest) if self.one_default else rest
            found = self._default(first, rest, "--text-column")
            texts = () if found is None else (found,)
        if image is not None:
            self._check(image, "--image-column")
        else:
            images = () if need == "text" else MORE_IMAGE_COLUMNS
            image = self._default(IMAGE_COLUMNS, images, "--image-column")
            if image is None and need == "image":
                image = self._default((), RARE_IMAGE_COLUMNS, "--image-column")
        if fallback is not None:
            self._check(fallback, "--fallback-column")
        if need == "text" and not texts:
            self._refuse((*self.text_defaults, *MORE_TEXT_COLUMNS), "--text-column")
        if need == "image" and image is None:
            self._refuse((*IMAGE_COLUMNS, *MORE_IMAGE_COLUMNS), "--image-column")
        chosen = {*texts, fallback}
        others = [] if wanted else [n for n in self.text_defaults if self.has(n)]
        not_chosen = tuple(name for name in others if name not in chosen)
        return Chosen(texts, weights, fallback, image, not_chosen)

    def _weighted(self, wanted: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        names: list[str] = []
        weights: list[float | None] = []
        for each in wanted:
            name, mark, value = each.rpartition("=")
            if self.has(each) or not mark:
                names.append(each)
                weights.append(None)
            else:
                names.append(name)
                weights.append(_weight(each, value))
            self._check(names[-1], "--text-column")
        if len({*names}) != len(names):
            raise InputError(f"--text-column names {', '.join(names)}; expected each column once")
        if len(names) < 2 or weights == [None] * len(names):
            return tuple(names), None
        return tuple(names), tuple(1.0 if each is None else each for each in weights)

    def _default(self, first: Sequence[str], more: Sequence[str], option: str) -> str | None:
        found = next(filter(self.has, first), None)
        if found is None:
            several = [*filter(self.has, more)]
            if len(several) > 1:
                raise InputError(
                    f"{self.source} has the columns {' and '.join(map(repr, several))}; name the "
                    f"one to read with {option}"
                )
            found = several[0] if several else None
        if found is not None:
            self._check(found, option)
        return found

    def _check(self, name: str, option: str) -> None:
        if not self.has(name):
            self._refuse((name,), option)
        check_unique(self.names, self.source, name)

    def _refuse(self, expected: Sequence[str], option: str) -> None:
        if option == "--image-column":
            candidates, what = [*filter(_may_be_images, self.names)], "Images"
        else:
            candidates, what = self.candidates(), "Captions"
        listed = ", ".join(candidates[:_NUM_CANDIDATES])
        may = f" {what} may be in: {listed}." if candidates else ""
        raise InputError(
            f"{self.source} has no column {' or '.join(map(repr, expected))}; its columns are "
            f"{', '.join(self.names)}.{may} Name one with {option}."
        )


def _may_be_images(name: str) -> bool:
    return any(part in name.lower() for part in _MAY_BE_IMAGES)


def _weight(option: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError as error:
        raise InputError(
            f"--text-column {option}: {value!r} is no number; expected a weight, as in caption=0.3"
        ) from error
    if not isfinite(weight) or weight <= 0:
        raise InputError(f"--text-column {option}: expected a weight above 0")
    return weight


def check_unique(names: Sequence[str], source: str, name: str) -> None:
    """Refuse a table with two columns of the name that is read."""
    if list(names).count(name) > 1:
        raise InputError(
            f"{source} has {list(names).count(name)} columns of the name {name!r}, expected one; "
            "rename or remove the others"
        )
