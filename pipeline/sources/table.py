"""Tables of captions and images: parquet, jsonl, csv, tsv, txt or webdataset tars, local or by any
URL of fsspec."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ...schemas import InputError, SamplesIdentity, fingerprint
from ...schemas.columns import to_plain
from ...schemas.escaping import shown, without_secrets
from ...schemas.urls import check_protocol, suffix_of, without_query
from .values import check_not_repeated, decode, not_utf8, read_objects, to_array
from .webdataset import BYTE_RANGE, TEXT, Reader, WebDataset

TEXT_COLUMNS = ("text", "prompt", "caption")
IMAGE_COLUMNS = ("image",)
TAR = ".tar"
SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt", TAR)
T = TypeVar("T")
_NUM_SHOWN = 5  # offending rows listed in a message
_CSV_BLOCKS = (1 << 20, 1 << 25, 1 << 28, (1 << 31) - 1)  # a row must fit in a block


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be read, with the reason."""

    reason: str


@dataclass(frozen=True)
class SampleTable:
    """Rows of an input file, in its order.

    Attributes:
        source: path or URL as the user named it.
        table: the two columns below, where they exist.
        text_column: name of the column with captions; None where the file has none.
        image_column: name of the column with images; None where the file has none.
    """

    source: str
    table: pa.Table
    text_column: str | None
    image_column: str | None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def slice(self, start: int, stop: int) -> "SampleTable":
        """Rows from start to stop."""
        return replace(self, table=self.table.slice(start, stop - start))

    def take(self, rows: np.ndarray) -> "SampleTable":
        """The given rows, in their order."""
        return replace(self, table=self.table.take(pa.array(rows, pa.int64())))

    def texts(self) -> pa.ListArray:
        """Captions as ``list<large_string>``, one list per row.

        Raises:
            InputError: a caption is missing or blank, or a row has no caption.
        """
        assert self.text_column is not None
        column = self.table[self.text_column]
        if _is_list(column.type):
            column = column.cast(pa.list_(pa.large_string())).combine_chunks()
        else:
            texts = column.cast(pa.large_string()).combine_chunks()
            offsets = pa.array(np.arange(len(texts) + 1, dtype=np.int32))
            column = pa.ListArray.from_arrays(offsets, texts)
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column.flatten())), 0)
        blank = pc.list_parent_indices(column).filter(pc.fill_null(blank, True))
        empty = pc.indices_nonzero(pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0))
        rows = sorted({*blank.to_pylist(), *empty.to_pylist()})
        if rows:
            shown = ", ".join(str(row) for row in rows[:_NUM_SHOWN])
            more = f" and {len(rows) - _NUM_SHOWN} more" if len(rows) > _NUM_SHOWN else ""
            raise InputError(
                f"{self.source}: {len(rows)} of {len(self)} rows have an empty caption in column "
                f"{self.text_column!r} (rows {shown}{more}, counted from 0). Remove them: the null "
                "caption is always stored, and caption dropout happens in training."
            )
        return column

    def image_names(self) -> pa.Array:
        """Path of each image, to be shown (string, null where it has none); bytes are not copied.
        Secrets in URLs are left out."""
        if self.image_column is None:
            return pa.nulls(len(self), pa.string())
        column = self.table[self.image_column].combine_chunks()
        if pa.types.is_struct(column.type):
            names = pc.struct_field(column, "path").cast(pa.string())
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            names = column.cast(pa.string())
        else:
            return pa.nulls(len(self), pa.string())
        if not pc.any(pc.match_substring(names, "://")).as_py():
            return names
        return pa.array([n and without_secrets(n) for n in names.to_pylist()], pa.string())

    def image_files(self) -> Iterator[bytes | Unreadable]:
        """The encoded bytes of each image in order, or the reason why it cannot be read.

        The column contains paths (relative to the folder of the table), bytes, structs of ``bytes``
        and ``path`` as HF datasets writes them, or byte ranges of tars.

        Raises:
            InputError: the column contains something else.
        """
        assert self.image_column is not None
        with Reader() as tars:
            for row, value in enumerate(_python_values(self.table[self.image_column])):
                try:
                    yield self._image_file(row, value, tars)
                except FileNotFoundError:
                    yield Unreadable(shown(f"no such file: {_image_name(value)}"))
                except OSError as error:
                    yield Unreadable(shown(f"{_image_name(value)}: {error}"))

    def _image_file(self, row: int, value: Any, tars: Reader) -> bytes | Unreadable:
        if isinstance(value, dict) and [*value] == BYTE_RANGE.names:
            return tars.read(value["tar"], value["start"], value["size"])
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
            with fsspec.open(value, "rb") as file:
                return file.read()
        filesystem, path = fsspec.core.url_to_fs(without_query(self.source))
        if "://" in path:  # HTTP, whose paths are URLs
            return filesystem.cat_file(urljoin(path, value))
        return filesystem.cat_file(str(PurePosixPath(path).parent / value))

    def identity(self) -> SamplesIdentity:
        """Number of rows and fingerprint of their captions, to join stores made from one table."""
        if self.text_column is None:
            return SamplesIdentity(num_samples=len(self), fingerprint=None)
        texts = self.texts()
        return SamplesIdentity(num_samples=len(self), fingerprint=fingerprint(texts))


def read_samples(
    source: str,
    *,
    text_column: str | None = None,
    image_column: str | None = None,
    limit: int | None = None,
    need: str,
) -> SampleTable:
    """Read a table of captions, images or both.

    Args:
        source: ``.parquet``, ``.jsonl``, ``.csv``, ``.tsv`` (no quoting: a row is a line) or
            ``.txt`` (one caption per line); a local path or any URL of fsspec. Or ``.tar``,
            several by a pattern, see
            :meth:`semroute.pipeline.sources.webdataset.WebDataset.open`.
        text_column: a column of strings or of lists of strings; default: the first of ``text``,
            ``prompt``, ``caption`` that exists. For tars ``txt`` (files) or a key of their JSON.
        image_column: default: ``image`` if it exists. For tars an extension; default: the first of
            jpg, jpeg, png, webp that a sample has.
        limit: number of first rows to read; None: all.
        need: ``"text"`` or ``"image"``: the column that must exist.

    Raises:
        InputError: no such file or format, not parseable, empty, or no such column.
    """
    tars = WebDataset.open(source) if _suffix(source) == TAR else None
    if tars is not None and not tars.samples:
        raise InputError(f"{source} has no samples; expected files such as 000.jpg and 000.txt")
    names = column_names(source) if tars is None else tars.names()
    defaults = TEXT_COLUMNS if tars is None else (TEXT, *TEXT_COLUMNS)
    text = _find_column(names, source, text_column, defaults, "--text-column", need == "text")
    image = _find_column(
        names, source, image_column, IMAGE_COLUMNS, "--image-column", need == "image"
    )
    columns = [name for name in (text, image) if name is not None]
    if tars is not None:
        table = tars.table(columns, limit)
    else:
        names_of = image if need == "text" else None
        table = _parsed(source, partial(_read_columns, columns=columns, names_of=names_of))
        image = image if image in table.schema.names else None
    if limit is not None:
        table = table.slice(0, limit)
    if table.num_rows == 0:
        raise InputError(f"{source} has no rows; expected at least one")
    if text is not None:
        kind = table.schema.field(text).type
        value = kind.value_type if _is_list(kind) else kind
        if pa.types.is_null(value):  # no row has a caption
            table = table.set_column(
                table.schema.get_field_index(text), text, table[text].cast(_with_strings(kind))
            )
        elif not (pa.types.is_string(value) or pa.types.is_large_string(value)):
            raise InputError(
                f"{source}: column {text!r} contains {kind}; expected strings or lists of strings"
            )
    return SampleTable(source, table, text, image)


def read_table(
    source: str, text_column: str | None = None, columns: Sequence[str] | None = None
) -> tuple[str, pa.Table]:
    """Read a table, but not tars: the name of its column of captions, and its columns.

    Args:
        source: see :func:`read_samples`.
        text_column: default: the first of ``text``, ``prompt``, ``caption`` that exists.
        columns: to read besides captions; default: all.

    Raises:
        InputError: no such file, format or column.
    """
    if _suffix(source) == TAR:
        raise InputError(f"{source}: labels are read from a table, not from tars")
    names = column_names(source)
    text = _find_column(names, source, text_column, TEXT_COLUMNS, "--text-column", True)
    missing = sorted({*(columns or ())} - {*names})
    if missing:
        raise InputError(
            f"{source} has no column {missing[0]!r}; its columns are {', '.join(names)}"
        )
    wanted = [name for name in names if columns is None or name in columns or name == text]
    for name in wanted:
        _check_unique(names, source, name)
    return str(text), _parsed(source, partial(_read_columns, columns=wanted))


def column_names(source: str) -> list[str]:
    """Columns of a table: of a jsonl the keys of all objects, of a txt ``text``.

    Raises:
        InputError: no such file or format, or it is empty.
    """
    return _parsed(source, _column_names)


def _suffix(source: str) -> str:
    return suffix_of(source, SUFFIXES)


def _parsed(source: str, read: Callable[[BinaryIO, str], T]) -> T:
    suffix = _suffix(source)
    if suffix not in SUFFIXES:
        raise InputError(
            f"{source}: cannot tell the format from {suffix or 'a name without suffix'!r}; "
            f"expected one of {', '.join(SUFFIXES)}"
        )
    first, *others = source.split("::")
    if others and "://" not in first and _suffix(first) in SUFFIXES:
        raise InputError(
            f"{source} names several tables, expected one; only tars may be several. Join the "
            "tables into one file."
        )
    check_protocol(source)
    try:
        with fsspec.open(source, "rb") as file:
            if not file.read(1):
                raise InputError(f"{source} is empty; expected at least one row")
            file.seek(0)
            return read(file, source)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{source}: no such file") from error
    except (pa.ArrowException, UnicodeError, json.JSONDecodeError) as error:
        raise InputError(f"{source} is not a readable {suffix[1:]} file: {error}") from error


def _column_names(file: BinaryIO, source: str) -> list[str]:
    suffix = _suffix(source)
    if suffix == ".parquet":
        return list(pyarrow.parquet.read_schema(pa.PythonFile(file, "r")).names)
    if suffix == ".txt":
        return ["text"]
    if suffix == ".jsonl":
        return [*{key: None for _, row in read_objects(file, source) for key in row}]

    def header(content: pa.BufferReader, options: pyarrow.csv.ReadOptions) -> list[str]:
        with pyarrow.csv.open_csv(
            content, read_options=options, parse_options=_csv_options(suffix)
        ) as reader:
            return list(reader.schema.names)

    return _with_large_rows(file, header)


def _read_columns(
    file: BinaryIO, source: str, columns: list[str], names_of: str | None = None
) -> pa.Table:
    """Read columns; of ``names_of``, a column of images, only names, as bytes may be too many."""
    suffix = _suffix(source)
    if suffix == ".parquet":
        parquet = pyarrow.parquet.ParquetFile(pa.PythonFile(file, "r"))
        if names_of is not None:
            columns = _replace_by_names(parquet.schema_arrow, columns, names_of)
        table = parquet.read(columns)
    elif suffix == ".txt":
        return _read_lines(file.read(), source)
    elif suffix == ".jsonl":
        return _read_jsonl(file, source, columns)
    else:
        table = _read_csv(file, source, columns)
    table = pa.table({name: to_plain(table[name]) for name in table.column_names})
    for name in table.column_names:
        row = not_utf8(table[name])
        if row is not None:
            raise InputError(
                f"{source}: row {row} (counted from 0): column {name!r} is not UTF-8. Save the "
                "file as UTF-8."
            )
    return table


def _read_lines(content: bytes, source: str) -> pa.Table:
    lines = content.rstrip(b"\r\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    texts = [
        decode(line, f"{source}: row {row} (counted from 0)") for row, line in enumerate(lines)
    ]
    return pa.table({"text": pa.array(texts, pa.string())})


def _read_jsonl(file: BinaryIO, source: str, columns: list[str]) -> pa.Table:
    # Only these columns become Arrow: the type of others may change from row to row.
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row, (_, document) in enumerate(read_objects(file, source)):
        check_not_repeated(document, columns, f"{source}: row {row} (counted from 0)")
        for name, column in values.items():
            column.append(document.get(name))
    return pa.table(
        {
            name: to_array(column, name, lambda row: f"{source}: row {row} (counted from 0)")
            for name, column in values.items()
        }
    )


def _read_csv(file: BinaryIO, source: str, columns: list[str]) -> pa.Table:
    suffix = _suffix(source)
    if suffix == ".csv":
        _check_quotes(file, source)

    def read(content: pa.BufferReader, options: pyarrow.csv.ReadOptions) -> pa.Table:
        return pyarrow.csv.read_csv(
            content,
            read_options=options,
            parse_options=_csv_options(suffix),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns,
                column_types={name: pa.string() for name in columns},
                null_values=[],
                check_utf8=False,  # checked afterwards, to name the row
            ),
        )

    return _with_large_rows(file, read)


def _with_large_rows(
    file: BinaryIO, read: Callable[[pa.BufferReader, pyarrow.csv.ReadOptions], T]
) -> T:
    """Read a csv in blocks that are as large as its largest row needs.

    Each attempt has a reader of its own: Arrow reads ahead in a thread, which may still move the
    position of the one before.
    """
    file.seek(0)
    content = pa.py_buffer(file.read())
    for size in _CSV_BLOCKS:
        try:
            return read(pa.BufferReader(content), pyarrow.csv.ReadOptions(block_size=size))
        except pa.ArrowInvalid as error:
            if "block" not in str(error) or size == _CSV_BLOCKS[-1]:
                raise
    raise AssertionError("the last block size returns or raises")


def _check_quotes(file: BinaryIO, source: str) -> None:
    """Refuse a csv whose last quote is not closed: the rest of the file would be one value."""
    num_quotes = sum(part.count(b'"') for part in iter(partial(file.read, 1 << 20), b""))
    if num_quotes % 2 == 0:
        return
    # A quote inside an unquoted value is a character. If the last one is open, it swallows a row
    # that is appended.
    names = _column_names(file, source)
    file.seek(0)
    content = file.read()
    row = ",".join("x" for _ in names)
    counts = []
    for rows in (content, content + f"\n{row}\n".encode()):
        with BytesIO(rows) as part:
            counts.append(_with_large_rows(part, _num_csv_rows))
    if counts[0] == counts[1]:
        raise InputError(
            f"{source}: row {counts[0] - 1} (counted from 0) opens a quote that is never closed, "
            "so the rest of the file would be one value. Close it, or double each quote inside "
            "quotes."
        )


def _num_csv_rows(content: pa.BufferReader, options: pyarrow.csv.ReadOptions) -> int:
    table = pyarrow.csv.read_csv(
        content,
        read_options=options,
        parse_options=_csv_options(".csv"),
        convert_options=pyarrow.csv.ConvertOptions(check_utf8=False),
    )
    return int(table.num_rows)


def _replace_by_names(schema: pa.Schema, columns: list[str], image: str) -> list[str]:
    """Columns with the column of images replaced by that of their names, if they have names."""
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        name = [f"{image}.path"] if kind.get_field_index("path") >= 0 else []
    else:
        name = [] if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else [image]
    return [column for column in columns if column != image] + name


def _csv_options(suffix: str) -> pyarrow.csv.ParseOptions:
    if suffix == ".tsv":  # tab-separated values know no quotes
        return pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False)
    return pyarrow.csv.ParseOptions(newlines_in_values=True)


def _find_column(
    names: Sequence[str],
    source: str,
    wanted: str | None,
    defaults: Sequence[str],
    option: str,
    required: bool,
) -> str | None:
    candidates = [wanted] if wanted is not None else list(defaults)
    found = next((name for name in candidates if name in names), None)
    if found is None and (required or wanted is not None):
        expected = " or ".join(repr(name) for name in candidates)
        raise InputError(
            f"{source} has no column {expected}; its columns are "
            f"{', '.join(names)}. Name one with {option}."
        )
    if found is not None and _suffix(source) != TAR:
        _check_unique(names, source, found)
    return found


def _check_unique(names: Sequence[str], source: str, name: str) -> None:
    if names.count(name) > 1:
        raise InputError(
            f"{source} has {names.count(name)} columns of the name {name!r}, expected one; rename "
            "or remove the others"
        )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _with_strings(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.large_string()) if _is_list(kind) else pa.large_string()


def _image_name(value: Any) -> str:
    return str(value["path"]) if isinstance(value, dict) else str(value)


def _python_values(column: pa.ChunkedArray) -> Iterator[Any]:
    for chunk in column.chunks:
        for scalar in chunk:
            yield scalar.as_py()
