"""Files of each format as columns, one or several read as one table."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json

from ...schemas import InputError
from ...schemas.arrow import ParquetReader, in_arrow
from ...schemas.columns import to_plain
from ...schemas.files import answer, reaching
from ...schemas.urls import check_protocol
from .columns import Columns
from .embedded import holds_bytes, references
from .nesting import descend, field_of, find_field, string_leaves, string_names
from .places import Files, compression_of, kind_of
from .values import (
    BOM,
    check_not_repeated,
    check_values,
    decode,
    not_utf8,
    read_document,
    read_objects,
    to_array,
)

T = TypeVar("T")
_CSV_BLOCKS = (1 << 20, 1 << 25, 1 << 28, (1 << 31) - 1)  # a row must fit in a block
_JSON = (".jsonl", ".json")
_BINARY = (".parquet", ".arrow")
_OLD = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
"""Suffixes of files that the first version read."""
_NUM_SEEN = 100  # rows in which candidates for a column are looked for


def column_names_of(path: str) -> list[str]:
    """Columns of a file: of JSON the keys of all objects, of a txt ``text``.

    Raises:
        InputError: no such file, not readable, or empty.
    """
    return parsed(path, _column_names)


def string_columns(path: str) -> list[str]:
    """Columns that may be captions: strings or lists of them, nested ones with dots."""
    return parsed(path, _string_columns)


def read_columns(path: str, columns: Sequence[str], names_of: str | None = None) -> pa.Table:
    """Columns of a file, by name; with dots, parts of a struct or object.

    Args:
        names_of: a column of images of which only names are read, as bytes may be too many; left
            out where it has none.

    Raises:
        InputError: no such file, or not readable.
    """
    return parsed(path, partial(_read_columns, columns=[*columns], names_of=names_of))


def parsed(path: str, read: Callable[[BinaryIO, str], T]) -> T:
    """What is read of a file, which is decompressed by its suffix.

    Raises:
        InputError: no such file, empty, or damaged.
    """
    kind = kind_of(path)
    try:
        with reaching(path), open_file(path) as file:
            if not file.read(1):
                raise InputError(f"{path} is empty; expected at least one row")
            file.seek(0)
            return read(file, path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such file{answer(error)}") from error
    except (pa.ArrowException, UnicodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable {kind[1:]} file: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # Arrow's own, of what is in the file.
        raise InputError(f"{path} is not a readable {kind[1:]} file: {error}") from error


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file, decompressed if its name says so.

    Raises:
        InputError: no such kind of URL; or damaged or truncated.
    """
    check_protocol(path)
    try:
        opened = fsspec.open(path, "rb")
    except (ValueError, ImportError) as error:
        raise InputError(f"{path} cannot be opened: {error}") from error
    compression = compression_of(path)
    with opened as file:
        if compression is None:
            yield file
            return
        try:
            content = pa.CompressedInputStream(pa.PythonFile(file, "r"), compression).read()
        except OSError as error:
            raise InputError(f"{path} is damaged or truncated: {error}") from error
        with pa.BufferReader(content) as plain:
            yield _Buffered(plain)


class _Buffered(BytesIO):
    """Decompressed bytes as a file of Python, whose lines can be read."""

    def __init__(self, content: pa.BufferReader) -> None:
        super().__init__(content.read_buffer().to_pybytes())


def _column_names(file: BinaryIO, source: str) -> list[str]:
    kind = kind_of(source)
    if kind in (".parquet", ".arrow"):
        return list(schema_of(file, source).names)
    if kind == ".txt":
        return ["text"]
    if kind in (".jsonl", ".json"):
        return [*{key: None for row in _objects(file, source) for key in row}]
    return _csv_names(_csv_content(file), kind)[0]


def _string_columns(file: BinaryIO, source: str) -> list[str]:
    kind = kind_of(source)
    if kind in (".parquet", ".arrow"):
        return string_names(schema_of(file, source))
    if kind in (".jsonl", ".json"):
        seen = islice(_objects(file, source), _NUM_SEEN)
        return [*{name: None for row in seen for name in string_leaves(row)}]
    return _column_names(file, source)


def schema_of(file: BinaryIO, source: str) -> pa.Schema:
    """The schema of a Parquet or Arrow file."""
    if kind_of(source) == ".arrow":
        return _arrow_reader(file, source).schema
    return ParquetReader(file).schema_arrow


def num_rows_of(file: BinaryIO, source: str) -> int:
    """Number of rows of a Parquet file."""
    return int(ParquetReader(file).metadata.num_rows)


def _objects(file: BinaryIO, source: str) -> Iterable[dict[str, Any]]:
    if kind_of(source) == ".json":
        return read_document(file.read(), source)
    return (row for _, row in read_objects(file, source))


def _arrow_reader(file: BinaryIO, source: str) -> Any:
    """A reader of batches: the datasets library writes streams, others files too, which Arrow reads
    in threads (see :mod:`semroute.schemas.arrow`)."""
    local = "://" not in source
    options = pa.ipc.IpcReadOptions(use_threads=local)
    try:
        opened = pa.memory_map(source) if local else pa.PythonFile(file, "r")
        return pa.ipc.open_stream(opened, options=options)
    except pa.ArrowInvalid:
        file.seek(0)
        opened = pa.memory_map(source) if local else pa.BufferReader(in_arrow(file.read()))
        return pa.ipc.open_file(opened, options=options)


def _read_columns(
    file: BinaryIO, source: str, columns: list[str], names_of: str | None = None
) -> pa.Table:
    kind = kind_of(source)
    if kind in (".parquet", ".arrow"):
        table = _read_binary(file, source, columns, names_of)
    elif kind == ".txt":
        return _read_lines(file.read(), source)
    elif kind in (".jsonl", ".json"):
        return _read_objects(file, source, columns)
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


def _read_binary(file: BinaryIO, source: str, columns: list[str], names_of: str | None) -> pa.Table:
    kind = kind_of(source)
    if kind == ".parquet":
        parquet = ParquetReader(file)
        schema = parquet.schema_arrow
    else:
        reader = _arrow_reader(file, source)
        schema = reader.schema
    wanted = {name: name for name in columns}
    if names_of is not None:
        part = _names_part(schema, names_of)
        wanted = {name: name for name in columns if name != names_of}
        wanted |= {} if part is None else {names_of: part}
    paths = {name: field_of(schema, part, source) for name, part in wanted.items()}
    if kind == ".parquet":
        table = parquet.read_columns([*{path.narrow: None for path in paths.values()}])
    else:
        table = reader.read_all().select([*{path.names[0]: None for path in paths.values()}])
        table.validate()
    found = {name: path.take(table) for name, path in paths.items()}
    if kind == ".arrow":
        for column in found.values():
            check_values(column)
    return pa.table(found)


def _names_part(schema: pa.Schema, image: str) -> str | None:
    """The part of a column of images that holds their names, if they have names."""
    kind = field_of(schema, image, "").type
    if pa.types.is_struct(kind):
        return f"{image}.path" if kind.get_field_index("path") >= 0 else None
    return None if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else image


def _read_lines(content: bytes, source: str) -> pa.Table:
    lines = content.rstrip(b"\r\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    texts = [
        decode(line, f"{source}: row {row} (counted from 0)") for row, line in enumerate(lines)
    ]
    return pa.table({"text": pa.array(texts, pa.string())})


def _read_objects(file: BinaryIO, source: str, columns: list[str]) -> pa.Table:
    # Only these columns become Arrow: the type of others may change from row to row.
    values: dict[str, list[Any]] = {name: [] for name in columns}
    for row, document in enumerate(_objects(file, source)):
        check_not_repeated(document, columns, f"{source}: row {row} (counted from 0)")
        for name, column in values.items():
            column.append(descend(document, name))
    return pa.table(
        {
            name: to_array(column, name, lambda row: f"{source}: row {row} (counted from 0)")
            for name, column in values.items()
        }
    )


def _read_csv(file: BinaryIO, source: str, columns: list[str]) -> pa.Table:
    suffix, data = kind_of(source), _csv_content(file)
    names, named = _csv_names(data, suffix)
    if suffix == ".csv":
        _check_quotes(data, names, named, source)

    def read(content: pa.BufferReader, options: pyarrow.csv.ReadOptions) -> pa.Table:
        return pyarrow.csv.read_csv(
            content,
            read_options=options,
            parse_options=_csv_options(suffix, keep_empty=len(names) == 1),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns,
                column_types={name: pa.string() for name in columns},
                null_values=[],
                check_utf8=False,  # checked afterwards, to name the row
            ),
        )

    return _with_large_rows(data, read, None if named else names)


def _csv_content(file: BinaryIO) -> bytes:
    """A csv or tsv without empty lines in front of its header and at its end, which are never
    rows."""
    file.seek(0)
    return file.read().removeprefix(BOM).strip(b"\r\n") + b"\n"


def _csv_names(data: bytes, kind: str) -> tuple[list[str], bool]:
    """Columns of a csv or tsv, and whether its first row names them. A row with a URL does not:
    then they are ``column_1`` and so on."""

    def header(content: pa.BufferReader, options: pyarrow.csv.ReadOptions) -> list[str]:
        with pyarrow.csv.open_csv(
            content, read_options=options, parse_options=_csv_options(kind)
        ) as reader:
            return list(reader.schema.names)

    names = _with_large_rows(data, header)
    if any("://" in name for name in names):
        return [f"column_{number}" for number in range(1, len(names) + 1)], False
    return names, True


def _with_large_rows(
    data: bytes,
    read: Callable[[pa.BufferReader, pyarrow.csv.ReadOptions], T],
    names: list[str] | None = None,
) -> T:
    """Read a csv in blocks that are as large as its largest row needs.

    Each attempt has a reader of its own: Arrow reads ahead in a thread, which may still move the
    position of the one before. Blocks are parsed one by one: Arrow 18, with one thread, waits for
    itself without end where a row is too large for a block and others are still to be parsed.

    Args:
        names: of its columns, where its first row is data.
    """
    content = in_arrow(data)  # read ahead in a thread
    for size in _CSV_BLOCKS:
        try:
            options = pyarrow.csv.ReadOptions(
                use_threads=False, block_size=size, column_names=names
            )
            return read(pa.BufferReader(content), options)
        except pa.ArrowInvalid as error:
            if "block" not in str(error) or size == _CSV_BLOCKS[-1]:
                raise
    raise AssertionError("the last block size returns or raises")


def _check_quotes(data: bytes, names: list[str], named: bool, source: str) -> None:
    """Refuse a csv whose last quote is not closed: the rest of the file would be one value."""
    if data.count(b'"') % 2 == 0:
        return
    # A quote inside an unquoted value is a character. If the last one is open, it swallows a row
    # that is appended.
    row = ",".join("x" for _ in names)
    count = partial(_num_csv_rows, keep_empty=len(names) == 1)
    counts = [
        _with_large_rows(rows, count, None if named else names)
        for rows in (data, data + f"{row}\n".encode())
    ]
    if counts[0] == counts[1]:
        raise InputError(
            f"{source}: row {counts[0] - 1} (counted from 0) opens a quote that is never closed, "
            "so the rest of the file would be one value. Close it, or double each quote inside "
            "quotes."
        )


def _num_csv_rows(
    content: pa.BufferReader, options: pyarrow.csv.ReadOptions, *, keep_empty: bool
) -> int:
    table = pyarrow.csv.read_csv(
        content,
        read_options=options,
        parse_options=_csv_options(".csv", keep_empty=keep_empty),
        convert_options=pyarrow.csv.ConvertOptions(check_utf8=False),
    )
    return int(table.num_rows)


def _csv_options(kind: str, *, keep_empty: bool = False) -> pyarrow.csv.ParseOptions:
    """How a csv or tsv is parsed.

    Args:
        keep_empty: an empty line is a row: where there is one column, it has an empty value.
    """
    if kind == ".tsv":  # tab-separated values know no quotes
        options = pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, double_quote=False)
    else:
        options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    options.ignore_empty_lines = not keep_empty
    return options


@dataclass(frozen=True)
class JoinedTables:
    """Files of one kind as one table.

    Attributes:
        files: in their order.
    """

    files: Files

    @property
    def folder(self) -> str | None:
        """What paths of images are relative to; None if they were made whole, since the files are
        in several folders."""
        parents = {*map(parent, self.files.paths)}
        return next(iter(parents)) if len(parents) == 1 else None

    @cached_property
    def names(self) -> list[str]:
        """Columns: of JSON all keys of all files, else those of the first file."""
        first, *rest = self.files.paths
        if self.files.kind not in _JSON:
            return column_names_of(first)
        return [*{name: None for path in (first, *rest) for name in column_names_of(path)}]

    def columns(self) -> Columns:
        """What there is to choose from."""
        first = self.files.paths[0]
        is_old = self.files.is_one_file and PurePosixPath(first).suffix.lower() in _OLD
        return Columns(
            self.files.source, self.names, self.has, lambda: string_columns(first), is_old=is_old
        )

    def has(self, name: str) -> bool:
        """Whether there is a column of a name, which may have dots."""
        if name in self.names:
            return True
        parts = name.split(".")
        if not any(".".join(parts[:length]) in self.names for length in range(1, len(parts))):
            return False
        if self.files.kind in _BINARY:
            return find_field(parsed(self.files.paths[0], schema_of), name) is not None
        leaves = string_columns(self.files.paths[0])
        return name in leaves or ".".join(p for p in parts if not p.isdecimal()) in leaves

    def is_embedded(self, image: str | None) -> bool:
        """Whether a column holds images themselves, which are then read on request."""
        if image is None or self.files.kind != ".parquet":
            return False
        path = self.files.paths[0]
        return holds_bytes(field_of(parsed(path, schema_of), image, path).type)

    def read(
        self, columns: Sequence[str], image: str | None, limit: int | None, *, names_only: bool
    ) -> pa.Table:
        """Columns of the first rows.

        Args:
            columns: to read besides images.
            image: column of images: strings, structs, or references if it :meth:`is_embedded`.
            names_only: of images only names are needed; the column is left out if they have none.

        Raises:
            InputError: a file cannot be read, or columns differ between files.
        """
        embedded = not names_only and self.is_embedded(image)
        tables: list[pa.Table] = []
        for number, path in enumerate(self.files.paths):
            wanted = [*columns] if image is None else [*dict.fromkeys((*columns, image))]
            table = read_columns(path, wanted, image if names_only or embedded else None)
            if embedded:
                table = _with_references(table, str(image), path, number)
            if image in table.column_names and self.folder is None:
                table = _with_whole_paths(table, str(image), path)
            tables.append(table)
            if limit is not None and sum(map(len, tables)) >= limit:
                break
        return tables[0] if len(tables) == 1 else self._concatenated(tables)

    def _concatenated(self, tables: list[pa.Table]) -> pa.Table:
        try:
            return pa.concat_tables([*map(_large, tables)], promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"{self.files.source}: columns differ between its files: {error}. Name files of "
                "one kind only."
            ) from error


def parent(path: str) -> str:
    """The folder of a file, by path or URL."""
    folder, mark, _ = path.rpartition("/")
    return folder if mark else "."


def whole_path(folder: str, path: str) -> str:
    """A path that may be relative to a folder."""
    is_whole = path.startswith("/") or "://" in path or folder == "."
    return path if is_whole else f"{folder}/{path}"


def _with_whole_paths(table: pa.Table, image: str, path: str) -> pa.Table:
    place = table.column_names.index(image)
    column = table[image]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return table
    paths = [value and whole_path(parent(path), value) for value in column.to_pylist()]
    return table.set_column(place, image, pa.array(paths, pa.string()))


def _with_references(table: pa.Table, image: str, path: str, number: int) -> pa.Table:
    num_rows = parsed(path, num_rows_of)
    names = pa.nulls(num_rows, pa.string())
    if image in table.column_names:
        names = table[image].cast(pa.string()).combine_chunks()
    columns = {name: table[name] for name in table.column_names if name != image}
    return pa.table({**columns, image: references(number, names)})


def _large(table: pa.Table) -> pa.Table:
    """Strings with large offsets, so that files of other versions of a table join."""
    fields = [
        field.with_type(pa.large_string()) if pa.types.is_string(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))
