"""Samples: captions and images of what the user names, as one table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urljoin

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import InputError, SamplesIdentity, fingerprint
from ...schemas.columns import one_array
from ...schemas.escaping import shown, without_secrets
from ...schemas.files import StorageError, answer, reaching
from ...schemas.urls import check_protocol
from .captions import Blank, list_rows, read_texts
from .columns import Chosen, check_unique
from .embedded import EMBEDDED, EmbeddedReader
from .folders import ImageFolder
from .formats import JoinedTables
from .places import FOLDER, IMAGE_SUFFIXES, TAR, Files, check_file, filesystem_of, find_files
from .webdataset import BYTE_RANGE, Reader, WebDataset

TEXT, IMAGE, ROW, WEIGHTS = "text", "image", "row", "weights"
"""Columns of :attr:`SampleTable.table`."""


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, with the reason."""

    reason: str


@dataclass(frozen=True)
class SampleTable:
    """Rows of a source, in its order.

    Attributes:
        source: as the user named it.
        table: the columns ``text`` (``list<large_string>``), ``image``, ``row`` (of the source, if
            some were left out or have no caption) and ``weights`` (``list<double>``, like ``text``,
            if the user gave some), where they exist.
        chosen: columns of the source that they come from.
        blank: what was done with rows without a caption.
        blank_rows: these rows, counted from 0, int64.
        folder: what paths of images are relative to; None: the working directory.
        files: that references to images name by number.
        found: the kind and number of files, in words.
    """

    source: str
    table: pa.Table
    chosen: Chosen
    blank: Blank
    blank_rows: np.ndarray
    folder: str | None
    files: tuple[str, ...]
    found: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def text_column(self) -> str | None:
        """Name of the column with captions, several with commas; None where there is none."""
        return self.chosen.text

    @property
    def image_column(self) -> str | None:
        """Name of the column with images; None where there is none."""
        return self.chosen.image if IMAGE in self.table.column_names else None

    def slice(self, start: int, stop: int) -> "SampleTable":
        """Rows from start to stop."""
        return replace(self, table=self.table.slice(start, stop - start))

    def take(self, rows: np.ndarray) -> "SampleTable":
        """The given rows, in their order."""
        return replace(self, table=self.table.take(pa.array(rows, pa.int64())))

    def without_texts(self) -> "SampleTable":
        """The same rows, whose captions are no longer needed."""
        missing = pa.nulls(len(self), pa.null())
        rest = {name: self.table[name] for name in self.table.column_names if name != TEXT}
        return replace(self, table=pa.table({TEXT: missing, **rest}))

    def describe(self) -> str:
        """What was found and chosen, in words."""
        parts = [f"{self.source}: {self.found}, {len(self):,} samples; {self.chosen.describe()}"]
        if num := len(self.blank_rows):
            done = "left out" if self.blank == "skip" else "stored as the null caption"
            parts.append(
                f"{num:,} rows without a caption are {done} ({list_rows(self.blank_rows)})"
            )
        return "; ".join(parts)

    def texts(self) -> pa.ListArray:
        """Captions as ``list<large_string>``, one list per row, none of them blank; with ``--blank
        null`` empty where a row has none."""
        return one_array(self.table[TEXT])

    def image_names(self) -> pa.Array:
        """Path of each image, to be shown (string, null where it has none); bytes are not copied.
        Secrets in URLs are left out."""
        if IMAGE not in self.table.column_names:
            return pa.nulls(len(self), pa.string())
        column = self.table[IMAGE]
        if pa.types.is_struct(column.type):
            chunks = [pc.struct_field(chunk, "path").cast(pa.string()) for chunk in column.chunks]
            names = one_array(pa.chunked_array(chunks, pa.string()))
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            names = one_array(column.cast(pa.string()))
        else:
            return pa.nulls(len(self), pa.string())
        if not pc.any(pc.match_substring(names, "://")).as_py():
            return names
        return pa.array([n and without_secrets(n) for n in names.to_pylist()], pa.string())

    def extra_columns(self) -> dict[str, pa.Array]:
        """``row`` and ``weights``, where there are any."""
        names = [name for name in (ROW, WEIGHTS) if name in self.table.column_names]
        return {name: one_array(self.table[name]) for name in names}

    def image_files(self) -> Iterator[bytes | Unreadable]:
        """The encoded bytes of each image in order, or the reason why it cannot be read.

        The column contains paths (relative to the folder of the table), bytes, structs of ``bytes``
        and ``path`` as HF datasets writes them, byte ranges of tars, or references to rows.

        Raises:
            InputError: the column contains something else.
        """
        column = str(self.chosen.image)
        with Reader() as tars, EmbeddedReader(self.files, column) as embedded:
            for row, value in enumerate(_python_values(self.table[IMAGE], self.source)):
                try:
                    with reaching(self._image_place(value)):
                        content = self._image_file(row, value, tars, embedded)
                except (_Refused, StorageError) as error:
                    content = Unreadable(shown(str(error)))
                except FileNotFoundError as error:
                    missing = f"no such file: {_image_name(value)}{answer(error)}"
                    content = Unreadable(shown(missing))
                except (OSError, pa.ArrowException) as error:
                    content = Unreadable(shown(f"{_image_name(value)}: {error}"))
                yield content

    def _image_place(self, value: Any) -> str:
        """The file that an image is read from, or the source."""
        if isinstance(value, dict):
            value = value.get("tar") or value.get("path")
        if not isinstance(value, str):
            return self.source
        return value if "://" in value else f"{self.folder}/{value}"

    def _image_file(
        self, row: int, value: Any, tars: Reader, embedded: EmbeddedReader
    ) -> bytes | Unreadable:
        if isinstance(value, dict) and [*value] == BYTE_RANGE.names:
            return tars.read(value["tar"], value["start"], value["size"])
        if isinstance(value, dict) and [*value] == EMBEDDED.names:
            value = embedded.read(value["file"], value["row"])
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if not value:
            return Unreadable("the row names no image")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise InputError(
                f"{self.source}: row {row}: an image is neither a path nor bytes: {value!r}"
            )
        if "://" in value:
            check_protocol(value)
            _check_image(value)
            with fsspec.open(value, "rb") as file:
                return file.read()
        return self._read_path(value)

    @cached_property
    def _place(self) -> tuple[Any, PurePosixPath]:
        filesystem, path = filesystem_of(self.folder or ".")
        return filesystem, PurePosixPath(path)

    def _read_path(self, value: str) -> bytes:
        """A file by its path; by kohya's habits it may have backslashes, and no suffix."""
        filesystem, folder = self._place
        if str(self.folder).startswith(("http://", "https://")):
            return filesystem.cat_file(urljoin(f"{self.folder}/", value))
        names = [value, *([value.replace("\\", "/")] if "\\" in value else [])]
        suffixes = (
            () if PurePosixPath(names[-1]).suffix.lower() in IMAGE_SUFFIXES else IMAGE_SUFFIXES
        )
        paths = [str(folder / name) for name in names]
        for path in (*paths[1:], *(paths[-1] + suffix for suffix in suffixes)):
            if not filesystem.exists(paths[0]) and filesystem.exists(path):
                return _cat(filesystem, path)
        return _cat(filesystem, paths[0])

    def identity(self) -> SamplesIdentity:
        """Number of rows and fingerprint of their captions, to join stores made from one table."""
        if TEXT not in self.table.column_names:
            return SamplesIdentity(num_samples=len(self), fingerprint=None)
        return SamplesIdentity(
            num_samples=len(self),
            fingerprint=fingerprint(self.table[TEXT]),
            blank=None if self.blank == "error" else self.blank,
            weights=self.chosen.weights,
        )


def read_samples(
    source: str,
    *,
    text_column: str | Sequence[str] | None = None,
    fallback_column: str | None = None,
    image_column: str | None = None,
    image_folder: str | None = None,
    blank: Blank = "error",
    limit: int | None = None,
    need: str,
) -> SampleTable:
    """Read captions, images or both.

    Args:
        source: files of one kind, by path, URL of fsspec, pattern or folder, several with ``::``
            between: ``.parquet``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` (no quoting: a row is a
            line), ``.txt`` (one caption per line), ``.arrow`` or ``.tar`` (webdataset). A folder of
            one of these, of images with a table of metadata, of images with captions in files
            beside them, or a dataset of the datasets library saved to disk.
        text_column: columns of strings or of lists of strings, with dots for parts of structs and
            objects; several may have weights, as in ``caption=1``. Default: the first of ``text``,
            ``prompt``, ``caption`` that exists, or ``TEXT``. For tars ``txt`` (files) or a key of
            their JSON; for images with files beside them ``txt`` or ``caption`` (files) or a key.
        fallback_column: whose captions stand in for those of rows that have none.
        image_column: default: ``image`` if it exists, or the only one of ``jpg``, ``png``,
            ``file_name``, ``image_path``, ``image_binary``. For tars an extension; default: the
            first of jpg, jpeg, png, webp that a sample has.
        image_folder: what paths of images are relative to; default: the folder of the table.
        blank: what to do with rows without a caption: refuse them, leave them out, or give them
            the null caption.
        limit: number of first rows to read; None: all.
        need: ``"text"`` or ``"image"``: the column that must exist.

    Raises:
        InputError: no such file or format, not parseable, empty, no such column, several columns
            of which none is the obvious one, or blank captions.
    """
    files = find_files(source)
    form = _open(files)
    chosen = form.columns().choose(text_column, image_column, fallback_column, need)
    texts = [*dict.fromkeys((*chosen.texts, *([chosen.fallback] if chosen.fallback else [])))]
    table = form.read(texts, chosen.image, limit, names_only=need == "text")
    table = table if limit is None else table.slice(0, limit)
    if table.num_rows == 0:
        raise InputError(f"{source} has no rows; expected at least one")
    columns: dict[str, Any] = {}
    blank_rows = np.zeros(0, np.int64)
    if chosen.texts:
        found = read_texts(source, table, chosen, blank)
        columns[TEXT], blank_rows = found.texts, found.blank
        if found.weights is not None:
            columns[WEIGHTS] = found.weights
    if chosen.image in table.column_names:
        columns[IMAGE] = table[chosen.image]
    if len(blank_rows):
        columns[ROW] = pa.array(np.arange(table.num_rows))
    kept = pa.table(columns)
    if blank == "skip" and len(blank_rows):
        rows = np.setdiff1d(np.arange(table.num_rows), blank_rows)
        if not len(rows):
            raise InputError(
                f"{source}: no row has a caption in column {chosen.text!r}; name another with "
                "--text-column"
            )
        kept = kept.take(pa.array(rows))
    folder = form.folder if image_folder is None else image_folder
    paths = tuple(files.paths) if form.is_embedded(chosen.image) else ()
    return SampleTable(source, kept, chosen, blank, blank_rows, folder, paths, files.describe())


def read_table(
    source: str, text_column: str | None = None, columns: Sequence[str] | None = None
) -> tuple[str, pa.Table]:
    """Read a table, but not tars or folders of images: the name of its column of captions, and its
    columns.

    Args:
        source: see :func:`read_samples`.
        text_column: default: the first of ``text``, ``prompt``, ``caption`` that exists.
        columns: to read besides captions; default: all.

    Raises:
        InputError: no such file, format or column.
    """
    form = _open_table(source)
    names = form.names
    text = form.columns().choose(text_column, None, None, "text").texts[0]
    missing = next((name for name in columns or () if not form.has(name)), None)
    if missing is not None:
        raise InputError(f"{source} has no column {missing!r}; its columns are {', '.join(names)}")
    wanted = names if columns is None else [name for name in names if name in columns]
    wanted = [*wanted, *(name for name in columns or () if name not in names)]
    wanted += [] if text in wanted else [text]
    for name in wanted:
        check_unique(names, source, name)
    return text, form.read(wanted, None, None, names_only=True)


def column_names(source: str) -> list[str]:
    """Columns of a table: of JSON the keys of all objects, of a txt ``text``.

    Raises:
        InputError: no such file or format, or it is empty.
    """
    return _open_table(source).names


def _open(files: Files) -> JoinedTables | ImageFolder | WebDataset:
    if files.kind == TAR:
        return WebDataset.open(files.source, files.paths)
    return ImageFolder(files) if files.kind == FOLDER else JoinedTables(files)


def _open_table(source: str) -> JoinedTables:
    form = _open(find_files(source))
    if not isinstance(form, JoinedTables):
        raise InputError(f"{source}: labels are read from a table, not from tars or folders")
    return form


class _Refused(Exception):
    """A path of an image that is not read."""


def _check_image(path: str) -> None:
    try:
        check_file(path)
    except InputError as error:
        raise _Refused(str(error)) from error


def _cat(filesystem: Any, path: str) -> bytes:
    if "file" in filesystem.protocol:
        _check_image(path)
    return filesystem.cat_file(path)


def _image_name(value: Any) -> str:
    return str(value["path"]) if isinstance(value, dict) else str(value)


def _python_values(column: pa.ChunkedArray, source: str) -> Iterator[Any]:
    for chunk in column.chunks:
        for scalar in chunk:
            try:
                yield scalar.as_py()
            except UnicodeDecodeError as error:  # names of its fields
                raise InputError(f"{source} is damaged: {error}") from error
