"""Webdataset tars: the files of each sample, and where their bytes are.

A sample is all files of a tar whose names are equal up to the first dot of the last part
(``dir/000.jpg``, ``dir/000.txt``); samples are in the order of their first files. Names without
such a dot, or with nothing before it, belong to no sample, as in webdataset.
"""

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from ...schemas import InputError
from ...schemas.files import answer, reaching
from .columns import TEXT_COLUMNS, Columns
from .nesting import descend, string_leaves
from .values import check_not_repeated, decode, parse_objects, to_array

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE = "image"
"""Column of images, whichever of these extensions a sample has."""
TEXT = "txt"
"""Column of captions in files of their own."""
_JSON = "json"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_BLOCK = 512
BYTE_RANGE = pa.struct(
    [("path", pa.string()), ("tar", pa.string()), ("start", pa.int64()), ("size", pa.int64())]
)
"""Where the bytes of a file are: its name, to be shown, the tar, first byte and number of bytes."""


@dataclass(frozen=True)
class _Member:
    """A file of a tar."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class WebDataset:
    """The samples of several tars; the bytes of their files are read on request.

    Attributes:
        source: the tars as the user named them.
        samples: the tar of each sample, and its files by extension.
    """

    source: str
    samples: list[tuple[str, dict[str, _Member]]]

    @classmethod
    def open(cls, source: str, paths: Sequence[str]) -> "WebDataset":
        """Read the headers of all tars.

        Args:
            source: as the user named them.
            paths: paths or URLs.

        Raises:
            InputError: no such tar, or one that is damaged or truncated; or no samples.
        """
        samples: list[tuple[str, dict[str, _Member]]] = []
        for path in paths:
            try:
                with reaching(path), fsspec.open(path, "rb") as file:
                    samples += [(path, files) for files in _read_headers(file, path)]
            except (FileNotFoundError, IsADirectoryError) as error:
                raise InputError(f"{source}: no such file: {path}{answer(error)}") from error
            except InputError:
                raise
            except (tarfile.TarError, ValueError, OverflowError) as error:  # numbers in its headers
                raise InputError(f"{path} is not a readable tar: {error}") from error
        if not samples:
            raise InputError(f"{source} has no samples; expected files such as 000.jpg and 000.txt")
        return cls(source, samples)

    @property
    def folder(self) -> str | None:
        """What paths of images are relative to: images are in the tars."""
        return None

    def columns(self) -> Columns:
        """What there is to choose from."""
        names = [*dict.fromkeys(self.names())]
        first = next((sample for sample in self.samples if _JSON in sample[1]), None)
        document = {} if first is None else self._json([first])[0]

        def has(name: str) -> bool:
            return name in names or descend(document, name) is not None

        def candidates() -> list[str]:
            texts = [TEXT] if TEXT in names else []
            return [*texts, *dict.fromkeys(string_leaves(document))]

        return Columns(self.source, names, has, candidates, (TEXT, *TEXT_COLUMNS))

    def is_embedded(self, image: str | None) -> bool:
        """Whether a column holds images themselves, rather than where they are."""
        return False

    def read(
        self, columns: Sequence[str], image: str | None, limit: int | None, *, names_only: bool
    ) -> pa.Table:
        """Columns of the first samples; see :meth:`JoinedTables.read`."""
        wanted = [*columns] if image is None else [*dict.fromkeys((*columns, image))]
        return self.table(wanted, limit)

    def names(self) -> list[str]:
        """Columns: extensions, ``image`` where there are images, and the keys of the first JSON."""
        extensions = {extension: None for _, files in self.samples for extension in files}
        images = [IMAGE] if any(name in extensions for name in IMAGE_EXTENSIONS) else []
        first = next((sample for sample in self.samples if _JSON in sample[1]), None)
        keys = [] if first is None else [*self._json([first])[0]]
        return [*extensions, *images, *keys]

    def table(self, columns: Sequence[str], limit: int | None) -> pa.Table:
        """Columns by name: captions as strings or lists of them, images as :data:`BYTE_RANGE`.

        Raises:
            InputError: a caption is not text, or its JSON is not valid.
        """
        samples = self.samples[:limit]
        return pa.table({name: self._column(name, samples) for name in columns})

    def _column(self, name: str, samples: list[tuple[str, dict[str, _Member]]]) -> pa.Array:
        extensions = IMAGE_EXTENSIONS if name == IMAGE else (name,)
        if name == TEXT:
            texts = self._read(samples, TEXT)
            return pa.array([text and text.rstrip("\r\n") for text in texts], pa.string())
        if not any(extension in files for _, files in samples for extension in extensions):
            documents = self._json(samples)
            places = [_place(tar, files, _JSON, row) for row, (tar, files) in enumerate(samples)]
            for document, place in zip(documents, places, strict=True):
                check_not_repeated(document, [name], place)
            values = [descend(document, name) for document in documents]
            return to_array(values, name, lambda row: places[row])
        byte_ranges = []
        for tar, files in samples:
            member = next((files[each] for each in extensions if each in files), None)
            byte_ranges.append(
                member
                and {
                    "path": f"{tar}/{member.name}",
                    "tar": tar,
                    "start": member.start,
                    "size": member.size,
                }
            )
        return pa.array(byte_ranges, BYTE_RANGE)

    def _json(self, samples: list[tuple[str, dict[str, _Member]]]) -> list[dict[str, Any]]:
        names = (f"{tar}: {files[_JSON].name}" if _JSON in files else tar for tar, files in samples)
        return parse_objects(self._read(samples, _JSON), names, "JSON")

    def _read(
        self, samples: list[tuple[str, dict[str, _Member]]], extension: str
    ) -> list[str | None]:
        """Contents of the file of each sample that has this extension, or None."""
        texts: list[str | None] = []
        with Reader() as reader:
            for row, (tar, files) in enumerate(samples):
                member = files.get(extension)
                if member is None:
                    texts.append(None)
                    continue
                content = reader.read(tar, member.start, member.size)
                texts.append(decode(content, _place(tar, files, extension, row)))
        return texts


class Reader:
    """Reads parts of files; the last file stays open."""

    def __init__(self) -> None:
        self._path = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, path: str, start: int, size: int) -> bytes:
        """Bytes of a file, by path or URL.

        Raises:
            OSError: no such file, or it ends too early.
        """
        if path != self._path:
            self.__exit__()
            self._file = None
            self._file, self._path = fsspec.open(path, "rb").open(), path
        assert self._file is not None
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) != size:
            raise OSError(f"{path} ends at byte {start + len(content)}")
        return content


def _place(tar: str, files: dict[str, _Member], extension: str, row: int) -> str:
    name = files[extension].name if extension in files else f"no .{extension}"
    return f"{tar}: row {row} (counted from 0): {name}"


def _member(info: tarfile.TarInfo, members: dict[str, _Member], path: str) -> _Member:
    """A file of a tar; of a second name of a file that was put in earlier (a hard link), it."""
    name = info.name.encode("utf-8", "backslashreplace").decode()  # as it is shown
    if info.islnk() and info.linkname in members:
        before = members[info.linkname]
        return _Member(name, before.start, before.size)
    if not info.isfile() or info.issparse():
        kind = "a file with holes" if info.issparse() else "a link, pipe or device"
        raise InputError(
            f"{path}: {info.name} is {kind}; expected whole files: make the tar with "
            "--dereference and without --sparse"
        )
    return _Member(name, info.offset_data, info.size)


def _read_headers(file: BinaryIO, path: str) -> list[dict[str, _Member]]:
    """Files of each sample of one tar, by extension."""
    samples: dict[str, dict[str, _Member]] = {}
    members: dict[str, _Member] = {}
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.size < 0:  # tarfile would read the same header for ever
                raise InputError(f"{path} is damaged: {info.name} has {info.size:,} bytes")
            size = info.size if info.isreg() else 0
            end = info.offset_data + -(-size // _BLOCK) * _BLOCK
            match = None if info.isdir() else _NAME.fullmatch(info.name)
            if match is None:
                continue
            member = _member(info, members, path)
            members[info.name] = member
            files = samples.setdefault(match[1], {})
            extension = match[2].lower()
            if extension in files:
                raise InputError(f"{path} holds {info.name} twice")
            files[extension] = member
    # tarfile takes a damaged or truncated header for the end of the tar, and of two concatenated
    # tars it reads only the first.
    file.seek(end)
    rest = file.read()
    if len(rest) < _BLOCK or rest.strip(b"\0"):
        raise InputError(
            f"{path} is damaged or truncated: after byte {end:,} expected zeros to the end of the "
            "tar"
        )
    return [*samples.values()]
