"""Images with captions in files of their own beside them: ``.txt``, ``.caption``, ``.json``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from .columns import TEXT_COLUMNS, Columns
from .nesting import descend, string_leaves
from .places import Files, filesystem_of
from .values import check_not_repeated, decode, parse_objects, to_array

IMAGE = "image"
TEXTS = ("txt", "caption")
"""Columns of captions: the suffixes of their files."""
_BLOCK = 1_024
_NUM_SEEN = 100


@dataclass(frozen=True)
class ImageFolder:
    """Images and the files beside them, as a table: a column ``image`` of paths, one for each
    suffix of captions, and the keys of JSON files.

    Attributes:
        files: the images in their order.
    """

    files: Files

    @property
    def folder(self) -> str | None:
        """What paths of images are relative to."""
        source = self.files.source.rstrip("/")
        whole = all(path.startswith(f"{source}/") for path in self.files.paths)
        return source if whole else None

    @cached_property
    def _documents(self) -> list[dict[str, Any]]:
        """JSON beside each image; empty where there is none."""
        paths = self.files.sidecars.get(".json", [None] * len(self.files.paths))
        return parse_objects(_contents(paths), map(str, paths), "a readable json file")

    @property
    def _texts(self) -> list[str]:
        return [name for name in TEXTS if f".{name}" in self.files.sidecars]

    @cached_property
    def names(self) -> list[str]:
        """Columns."""
        keys = (key for document in self._documents for key in document)
        return [*dict.fromkeys((IMAGE, *self._texts, *keys))]

    def columns(self) -> Columns:
        """What there is to choose from.

        Raises:
            InputError: captions are in files of two suffixes.
        """
        defaults = tuple(self._texts) or TEXT_COLUMNS
        return Columns(
            self.files.source,
            self.names,
            self.has,
            self._candidates,
            text_defaults=defaults,
            is_old=False,
            one_default=len(self._texts) > 1,
        )

    def has(self, name: str) -> bool:
        """Whether there is a column of a name, which may have dots."""
        return name in self.names or any(
            descend(each, name) is not None for each in self._documents
        )

    def _candidates(self) -> list[str]:
        leaves = (name for each in self._documents[:_NUM_SEEN] for name in string_leaves(each))
        return [*dict.fromkeys((*self._texts, *leaves))]

    def is_embedded(self, image: str | None) -> bool:
        """Whether a column holds images themselves."""
        return False

    def read(
        self, columns: Sequence[str], image: str | None, limit: int | None, *, names_only: bool
    ) -> pa.Table:
        """Columns of the first rows; see :meth:`JoinedTables.read`."""
        wanted = [*columns] if image is None else [*columns, image]
        return pa.table({name: self._column(name, slice(0, limit)) for name in wanted})

    def _column(self, name: str, part: slice) -> pa.Array:
        if name == IMAGE:
            skip = 0 if self.folder is None else len(self.folder) + 1
            return pa.array([path[skip:] for path in self.files.paths[part]], pa.string())
        if name in self._texts:
            texts = _contents(self.files.sidecars[f".{name}"][part])
            return pa.array([text and text.rstrip("\r\n") for text in texts], pa.string())
        paths = self.files.sidecars[".json"][part]
        documents = self._documents[part]
        for path, document in zip(paths, documents, strict=True):
            check_not_repeated(document, [name], str(path))
        values = [descend(document, name) for document in documents]
        return to_array(values, name, lambda row: f"{paths[row]}")


def _contents(paths: Sequence[str | None]) -> list[str | None]:
    """Texts of files, a block of them at a time; None where there is none."""
    texts: list[str | None] = []
    for first in range(0, len(paths), _BLOCK):
        block = paths[first : first + _BLOCK]
        there = [path for path in block if path is not None]
        if not there:
            texts += [None] * len(block)
            continue
        filesystem, _ = filesystem_of(there[0])
        inner = {path: filesystem_of(path)[1] for path in there}
        found = filesystem.cat([*inner.values()])
        if isinstance(found, bytes):
            found = {inner[there[0]]: found}
        texts += [path and decode(found[inner[path]], path) for path in block]
    return texts
