"""Parquet within bounds: a page of a few bytes can stand for any number of values."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ....schemas.arrow import ParquetReader
from ....schemas.files import read_file

MAX_RATIO = 200
"""Bytes in memory per byte of the file; captions come to 3 to 20."""
MIN_LIMIT = 2**26
"""Bytes that any table may take in memory."""
MAX_ROW_BYTES = 2**16
"""Bytes of the file per row, beside those above."""
MAX_ROW_GROUPS = 64
"""Row groups of any table; a larger one has one per thousand rows more."""
READ_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError)
"""Errors with which reading damaged Parquet ends."""
_VALUE_BYTES = 8  # of the widest number
_PAGE_BYTES = 2**16  # a page costs time, however small it is
_MAX_NESTING = 8
_MAX_FIELDS = 64


def max_file_bytes(num_rows: int) -> int:
    """Largest file of a table of so many rows."""
    return MIN_LIMIT + MAX_ROW_BYTES * num_rows


def read_parquet(
    content: pa.Buffer, schema: pa.Schema, num_rows: int, optional: Collection[str] = ()
) -> pa.Table:
    """The columns of a table that a schema names; others are not read.

    Args:
        content: of the file.
        num_rows: that it must have.
        optional: columns that need not be there.

    Raises:
        ValueError: it is another table, or stands for more than a file of its size can hold; the
            message goes after the name of the file.
        READ_ERRORS: it is damaged.
    """
    file = ParquetReader(content)
    if file.metadata.num_rows != num_rows:
        raise ValueError(f"has {file.metadata.num_rows} rows; the manifest says {num_rows}")
    if num_rows > content.size:
        raise ValueError(f"has {num_rows:,} rows in {content.size:,} bytes")
    return _read(content, file, schema, optional)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of a file that a schema names, with the metadata of the file: a table of
    any number of rows, one row at least.

    Raises:
        ValueError, READ_ERRORS: as :func:`read_parquet`.
    """
    content = pa.py_buffer(read_file(path, follow=True))
    file = ParquetReader(content)
    if not file.metadata.num_rows:
        raise ValueError("has no rows")
    return _read(content, file, schema)


def _read(
    content: pa.Buffer,
    file: ParquetReader,
    schema: pa.Schema,
    optional: Collection[str] = (),
) -> pa.Table:
    metadata, limit = file.metadata, MIN_LIMIT + MAX_RATIO * content.size
    groups = metadata.num_row_groups
    if groups > MAX_ROW_GROUPS + metadata.num_rows // 1000:
        raise ValueError(f"has {metadata.num_rows:,} rows in {groups:,} groups")
    names = _columns(file.schema_arrow, schema, optional)
    repeated = _check_pages(content, metadata, {*names}, limit)
    texts = [name for name in names if pa.types.is_string(schema.field(name).type)]
    # A text that occurs often is stored once: it is counted before it is written out.
    rest = [name for name in names if name not in repeated]
    table = file.read_columns(rest)
    _check_bytes(table.nbytes, limit)
    if repeated:
        texts = [name for name in names if name in repeated]
        found = ParquetReader(content, texts).read_columns(texts)
        found.validate(full=True)
        _check_bytes(table.nbytes + sum(map(_text_bytes, found.columns)), limit)
        for name in texts:
            table = table.append_column(schema.field(name), found[name].cast(pa.string()))
    table = table.select(names)
    table.validate(full=True)
    for name in names:
        missing = 0 if schema.field(name).nullable else _null_count(table[name])
        if missing:
            raise ValueError(f"{missing} values of {name} are missing")
    return table.replace_schema_metadata(file.schema_arrow.metadata)


def _columns(found: pa.Schema, schema: pa.Schema, optional: Collection[str]) -> list[str]:
    """Names of the columns to read."""
    names = []
    for field in schema:
        places = found.get_all_field_indices(field.name)
        if not places and field.name in optional:
            continue
        if len(places) != 1:
            raise ValueError(f"has {len(places)} columns {field.name}; expected one")
        kind = found.field(places[0]).type
        is_list = pa.types.is_list(kind) and pa.types.is_list(field.type)
        inner = (kind.value_type, field.type.value_type) if is_list else (kind, field.type)
        if inner[0] != inner[1]:
            raise ValueError(f"column {field.name} is {kind}; expected {field.type}")
        names.append(field.name)
    return names


def _check_bytes(found: int, limit: int) -> None:
    if found > limit:
        raise ValueError(
            f"stands for {found:,} bytes or more; expected at most {limit:,} of a file of its size"
        )


def _null_count(column: pa.ChunkedArray) -> int:
    inner = sum(c.flatten().null_count for c in column.chunks if pa.types.is_list(c.type))
    return int(column.null_count + inner)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a dictionary-encoded column when each text is written out."""
    total = 0
    for chunk in column.chunks:
        sizes = pc.binary_length(chunk.dictionary).cast(pa.int64())
        total += pc.sum(sizes.take(chunk.indices)).as_py() or 0
    return total


def _check_pages(content: pa.Buffer, metadata: Any, names: Collection[str], limit: int) -> set[str]:
    """Refuse pages that stand for too much; returns text columns whose texts may repeat too often
    to be written out uncounted."""
    total, possible = 0, dict.fromkeys(names, 0)
    view = memoryview(content).cast("B")
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            name = column.path_in_schema.partition(".")[0]
            if name not in possible:
                continue
            largest = num_values = 0
            for page in _pages(view, column):
                total += page.num_bytes + _PAGE_BYTES
                if page.is_dictionary:
                    largest = max(largest, page.num_bytes)
                else:
                    total += _VALUE_BYTES * page.values
                    num_values += page.values
                _check_bytes(total, limit)
            if num_values != column.num_values:
                raise ValueError(
                    f"pages of {name} have {num_values:,} values; its footer says "
                    f"{column.num_values:,}"
                )
            if column.physical_type == "BYTE_ARRAY":
                possible[name] += largest * num_values
    return {name for name, num_bytes in possible.items() if total + num_bytes > limit}


class _Page:
    """A page of a column, by its header.

    Attributes:
        num_bytes: uncompressed.
        values: their number.
        is_dictionary: whether the values are those that others refer to.
    """

    def __init__(self, header: dict[int, Any]) -> None:
        self.num_bytes, self.stored_bytes = int(header[2]), int(header[3])
        kind = int(header[1])
        self.is_dictionary = kind == _DICTIONARY
        self.values = int(header[_HEADERS[kind]][1]) if kind in _HEADERS else 0
        if min(self.num_bytes, self.stored_bytes, self.values) < 0:
            raise ValueError("a page has a negative size")


_DICTIONARY = 2
_HEADERS = {0: 5, _DICTIONARY: 7, 3: 8}
"""Type of a page -> field of its header that holds the number of values."""


def _pages(content: memoryview, column: Any) -> Iterator[_Page]:
    start, size = column.data_page_offset, column.total_compressed_size
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    end = start + size
    if start < 0 or size < 0 or end > len(content):
        raise ValueError(f"pages at bytes {start:,} to {end:,} are outside the file")
    while start < end:
        reader = _Compact(content[start:end])
        page = _Page(reader.struct())
        yield page
        start += reader.place + page.stored_bytes


class _Compact:
    """Reads the header of a page: Thrift's compact protocol, values that are not needed skipped."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.place = content, 0

    def _byte(self) -> int:
        if self.place >= len(self.content):
            raise ValueError("the header of a page is cut off")
        self.place += 1
        return self.content[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("the header of a page has an endless number")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Fields by their number."""
        if depth > _MAX_NESTING:
            raise ValueError("the header of a page is nested too deeply")
        fields: dict[int, Any] = {}
        last = 0
        for _ in range(_MAX_FIELDS):
            head = self._byte()
            if head == 0:
                return fields
            last = last + (head >> 4) if head >> 4 else self._number()
            fields[last] = self._value(head & 15, depth)
        raise ValueError("the header of a page has too many fields")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true, false
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
            return self._number()
        if kind in (7, 8):  # a double; bytes
            size = 8 if kind == 7 else self._varint()
            self.place += size
            return None
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"the header of a page has a field of type {kind}")
