"""Images inside Parquet files, read a few at a time instead of being held."""

from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from ...schemas.arrow import ParquetReader
from .nesting import Field, field_of

BATCH_ROWS = 32
EMBEDDED = pa.struct([("path", pa.string()), ("file", pa.int32()), ("row", pa.int64())])
"""Where an image is: its name, to be shown, the number of the file, and its row there."""


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images themselves."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def references(file: int, names: pa.Array) -> pa.StructArray:
    """References to all rows of a file, :data:`EMBEDDED`."""
    rows = np.arange(len(names))
    columns = [names, pa.array(np.full(len(names), file, np.int32)), pa.array(rows)]
    return pa.StructArray.from_arrays(columns, fields=[*EMBEDDED])


class EmbeddedReader:
    """Reads images by file and row; fast where rows ascend.

    Args:
        paths: of the Parquet files, by number.
        column: of images, bytes or structs of ``bytes`` and ``path``.
    """

    def __init__(self, paths: Sequence[str], column: str) -> None:
        self._paths, self._column = paths, column
        self._opened: Any = None
        self._file, self._group, self._first = -1, -1, 0
        self._batch: pa.RecordBatch | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def __enter__(self) -> "EmbeddedReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_file()

    def read(self, file: int, row: int) -> Any:
        """The value of a row: bytes, or a mapping of ``bytes`` and ``path``; None where null."""
        if file != self._file:
            self._open(file)
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, int(self._starts[group]), None
            self._batches = self._parquet.batches(BATCH_ROWS, group, [self._field.narrow])
        while self._batch is None or row >= self._first + self._batch.num_rows:
            self._first += 0 if self._batch is None else self._batch.num_rows
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise OSError(f"{self._paths[self._file]} has fewer rows than it says")
        table = pa.Table.from_batches([self._batch.slice(row - self._first, 1)])
        return self._field.take(table)[0].as_py()

    def _open(self, file: int) -> None:
        self._close_file()
        self._opened = fsspec.open(self._paths[file], "rb").open()
        self._parquet = ParquetReader(self._opened)
        metadata = self._parquet.metadata
        counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts[:-1])]).astype(np.int64)
        self._field: Field = field_of(self._parquet.schema_arrow, self._column, self._paths[file])
        self._file = file

    def _close_file(self) -> None:
        if self._opened is not None:
            self._opened.close()
        self._opened, self._file, self._group, self._first = None, -1, -1, 0
        self._batch, self._batches = None, iter(())
