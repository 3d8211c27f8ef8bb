"""Columns of the user's tables as the types that this package computes with."""

import numpy as np
import pyarrow as pa


def to_plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with dictionaries, views and lists of fixed size as plain strings and lists."""
    kind = _plain_type(column.type)
    return column if kind == column.type else column.cast(kind)


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """All values in one array; Arrow's own ``combine_chunks`` copies a single chunk, too."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers without missing values, ``[n]``, read-only and where possible not copied.

    Arrow's own ``to_numpy`` imports pandas if that is installed, which takes half a second.
    """
    return np.from_dlpack(one_array(column) if isinstance(column, pa.ChunkedArray) else column)


def as_column(values: np.ndarray) -> pa.Array:
    """Numbers ``[n]`` as a column that shares their memory.

    ``pa.array`` imports pandas if that is installed, which takes half a second.
    """
    values = np.ascontiguousarray(values)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_fixed_size_list(kind) or (
        (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        and _plain_type(kind.value_type) != kind.value_type
    ):
        return pa.large_list(_plain_type(kind.value_type))
    return kind
