"""Tables in one or several files of a kind, read as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import pyarrow as pa

from ...schemas import InputError
from .columns import Columns
from .embedded import holds_bytes, references
from .formats import (
    column_names_of,
    num_rows_of,
    parsed,
    read_columns,
    schema_of,
    string_columns,
)
from .nesting import field_of, find_field
from .places import Files

_JSON = (".jsonl", ".json")
_BINARY = (".parquet", ".arrow")
_OLD = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
"""Suffixes of files that the first version read."""


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
        return name in string_columns(self.files.paths[0])

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
