"""Parquet files of tables that something is wrong with."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def _written(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def _shortened(path: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content)
    path.write_bytes(content.getvalue()[:-9])


def _pipe(path: Path, _table: pa.Table) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path, _table: pa.Table) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _bomb(path: Path, table: pa.Table) -> None:
    """Eight million rows in a few kilobytes."""
    rows = table.slice(0, 1)
    columns = [
        pa.array(np.zeros(8_000_000, np.int8)).cast(field.type)
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        else pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(8_000_000, np.int8)), rows[field.name].combine_chunks()
        )
        for field in table.schema
    ]
    pq.write_table(pa.table(columns, names=table.column_names), path, store_schema=False)


def _renamed(path: Path, table: pa.Table) -> None:
    _written(path, table.rename_columns([f"{name}_" for name in table.column_names]))


def _of_bytes(path: Path, table: pa.Table) -> None:
    """Texts as bytes that are no UTF-8."""
    texts = [
        pa.array([b"\xff"] * len(table)) if pa.types.is_string(field.type) else column
        for field, column in zip(table.schema, table.columns, strict=True)
    ]
    _written(path, pa.table(texts, names=table.column_names))


def _without_values(path: Path, table: pa.Table) -> None:
    nothing = [pa.nulls(len(table), field.type) for field in table.schema]
    fields = [field.with_nullable(True) for field in table.schema]
    _written(path, pa.table(nothing, schema=pa.schema(fields)))


def _twice(path: Path, table: pa.Table) -> None:
    both = pa.table([*table.columns, *table.columns], names=table.column_names * 2)
    _written(path, both)


DAMAGES: dict[str, Callable[[Path, pa.Table], None]] = {
    "no rows": lambda path, table: _written(path, table.slice(0, 0)),
    "cut off": _shortened,
    "no parquet": lambda path, _table: path.write_text("[]") and None,
    "a pipe": _pipe,
    "a folder": _folder,
    "a bomb": _bomb,
    "other columns": _renamed,
    "bytes for texts": _of_bytes,
    "nulls": _without_values,
    "columns twice": _twice,
}
"""What is wrong -> writes such a file in place of a table."""
