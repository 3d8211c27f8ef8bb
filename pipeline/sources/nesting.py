"""Columns inside columns, by names with dots: ``i18n.en.p``. A number is a place in a list, counted
from 0: ``conversations.1.value``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import InputError


@dataclass(frozen=True)
class Field:
    """A column of an Arrow table, or a part of one.

    Attributes:
        names: of the column, then of the fields of its structs and places in its lists.
        type: of the part; of all values of a list on the way to it, a list.
        through_list: whether a list is on the way to it.
    """

    names: tuple[str, ...]
    type: pa.DataType
    through_list: bool

    @property
    def narrow(self) -> str:
        """As Parquet names it, so that no other part of the column is read."""
        return self.names[0] if self.through_list else ".".join(self.names)

    def take(self, table: pa.Table) -> pa.ChunkedArray:
        """Its values in a table that has at least this part of the column."""
        column = table[self.names[0]]
        for name in self.names[1:]:
            chunks = [_part(chunk, name) for chunk in column.chunks]
            column = pa.chunked_array(chunks) if chunks else pa.chunked_array([], self.type)
        return column


def _part(values: pa.Array, name: str) -> pa.Array:
    """A field of structs, or of the structs in lists, or a value of lists; null where these are."""
    if pa.types.is_struct(values.type):
        return pc.struct_field(values, name)
    if name.isdecimal():
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        place = min(int(name), int(lengths.max(initial=0)))  # beyond it there is none
        rows = values.offsets.to_numpy()[:-1] + place
        return values.values.take(pa.array(rows, mask=lengths <= place))
    flat = pc.struct_field(values.values, name)
    mask = values.is_null() if values.null_count else None
    return type(values).from_arrays(values.offsets, flat, mask=mask)


def find_field(schema: pa.Schema, name: str) -> Field | None:
    """The column of a name; with dots, the part of a struct or list unless a column has that
    name."""
    if name in schema.names:
        places = schema.get_all_field_indices(name)
        return Field((name,), schema.field(places[0]).type, False)
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        column = ".".join(parts[:length])
        if column not in schema.names:
            continue
        kind, in_list, through_list = schema.field(column).type, False, False
        for part in parts[length:]:
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                if in_list:
                    return None
                kind, through_list = kind.value_type, True
                if part.isdecimal():
                    continue
                in_list = True
            if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
                return None
            kind = kind.field(part).type
        kind = pa.list_(kind) if in_list else kind
        return Field((column, *parts[length:]), kind, through_list)
    return None


def field_of(schema: pa.Schema, name: str, source: str) -> Field:
    """As :func:`find_field`.

    Raises:
        InputError: no such column.
    """
    field = find_field(schema, name)
    if field is None:
        raise InputError(
            f"{source} has no column {name!r}; its columns are {', '.join(schema.names)}"
        )
    return field


def string_names(schema: pa.Schema) -> list[str]:
    """Columns of strings or of lists of them, and such parts of structs."""
    return [name for field in schema for name in _strings(field.name, field.type)]


def _strings(name: str, kind: pa.DataType) -> Iterator[str]:
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _strings(f"{name}.{field.name}", field.type)
        return
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_struct(kind.value_type):
            yield from _strings(name, kind.value_type)
            return
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        yield name


def descend(document: Mapping[str, Any], name: str) -> Any:
    """The value of a key of an object; with dots, of objects inside it unless the object has that
    key; None where it has none. Of a list of objects, a list of their values; with a number, of one
    of them."""
    if name in document:
        return document[name]
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        key = ".".join(parts[:length])
        if key in document:
            return _inner(document[key], parts[length:])
    return None


def _inner(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, list):
        if parts[0].isdecimal():
            return _inner(value[int(parts[0])], parts[1:]) if int(parts[0]) < len(value) else None
        return [_inner(each, parts) for each in value]
    return _inner(value.get(parts[0]), parts[1:]) if isinstance(value, Mapping) else None


def string_leaves(value: Any, name: str = "") -> Iterator[str]:
    """Names of strings, and of lists of them, inside an object."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from string_leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str):
        yield name
    elif isinstance(value, list) and value:
        yield from string_leaves(value[0], name)
