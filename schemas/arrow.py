"""What Arrow does with Python's objects, so that its threads do not hold on to them.

A thread that does for a moment after the work, in which the process ends, cannot let go of an
object of Python's any more: the process then waits for it for ever, or is aborted
(https://github.com/apache/arrow/issues/50482).
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet


def in_arrow(content: bytes) -> pa.Buffer:
    """A copy in Arrow's own memory, which its threads may hold for as long as they like."""
    buffer = pa.allocate_buffer(len(content))
    memoryview(buffer).cast("B")[:] = content
    return buffer


def grouped(table: pa.Table, keys: Sequence[str]) -> pa.TableGroupBy:
    """Rows of a table by values of columns, to be aggregated in the calling thread."""
    return table.group_by([*keys], use_threads=False)


def ascending(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """A table sorted by columns in the calling thread; equal rows keep their order."""
    return table.take(pc.sort_indices(table, [(key, "ascending") for key in keys]))


def passing(table: pa.Table, expression: pc.Expression) -> pa.Table:
    """Rows for which an expression is true, found in the calling thread."""
    from pyarrow import acero  # and with it pandas

    source = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
    kept = acero.Declaration("filter", acero.FilterNodeOptions(expression), [source])
    return kept.to_table(use_threads=False)


class ParquetReader(pyarrow.parquet.ParquetFile):
    """A Parquet file in memory or a file of Python's, read in the calling thread.

    Args:
        source: what is read.
        texts: columns to be read as dictionaries.
    """

    def __init__(self, source: pa.Buffer | BinaryIO, texts: Sequence[str] = ()) -> None:
        memory = isinstance(source, pa.Buffer)
        opened = pa.BufferReader(source) if memory else pa.PythonFile(source, "r")
        super().__init__(opened, read_dictionary=[*texts] or None, pre_buffer=False)

    def read_columns(self, names: Sequence[str]) -> pa.Table:
        """Columns, or parts of them, as one table."""
        return self.read([*names], use_threads=False)

    def batches(self, size: int, group: int, names: Sequence[str]) -> Iterator[Any]:
        """Columns of a row group as batches of so many rows at most."""
        return self.iter_batches(size, [group], [*names], use_threads=False)
