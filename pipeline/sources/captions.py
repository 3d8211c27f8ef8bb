"""Columns of captions as lists of captions per sample: several columns, fallback, blanks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas import InputError
from ...schemas.columns import one_array
from .columns import Chosen

Blank = Literal["error", "skip", "null"]
"""What to do with rows without a caption."""
_BLOCK = 65_536  # texts that are looked at at a time
_NUM_SHOWN = 5  # offending rows listed in a message


@dataclass(frozen=True)
class RowTexts:
    """Captions of rows.

    Attributes:
        texts: ``list<large_string>``, at least one per row that is kept.
        weights: ``list<float>`` like them, or None.
        blank: rows that had no caption, int64, ascending.
    """

    texts: pa.ListArray
    weights: pa.ListArray | None
    blank: np.ndarray


def as_lists(column: pa.ChunkedArray, source: str, name: str) -> pa.ListArray:
    """A column of strings or of lists of them as ``list<large_string>``.

    Raises:
        InputError: it contains something else.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    value = kind.value_type if is_list else kind
    if not (
        pa.types.is_null(value) or pa.types.is_string(value) or pa.types.is_large_string(value)
    ):
        raise InputError(
            f"{source}: column {name!r} contains {kind}; expected strings or lists of strings"
        )
    if is_list:
        lists = one_array(column.cast(pa.list_(pa.large_string())))
        # A null may lie over texts, as always in lists of a fixed size: copying leaves them out.
        return lists.take(pa.array(np.arange(len(lists)))) if lists.null_count else lists
    texts = one_array(column.cast(pa.large_string()))
    offsets = pa.array(np.arange(len(texts) + 1, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, texts)


def read_texts(source: str, table: pa.Table, chosen: Chosen, blank: Blank) -> RowTexts:
    """The captions of all rows, those of several columns one after the other.

    Blank captions of several columns, or beside others of a list if ``blank`` is not ``error``, are
    left out. A row that has none left takes those of the fallback column.

    Raises:
        InputError: a column without strings; or blank captions, and ``blank`` is ``error``.
    """
    lists = [as_lists(table[name], source, name) for name in chosen.texts]
    fallback = chosen.fallback
    if blank == "error" and fallback is None and len(lists) == 1:
        rows = _blank_rows(lists[0])
        _refuse(source, chosen, rows, len(table))
        return RowTexts(lists[0], None, np.zeros(0, np.int64))
    texts, weights = _joined(lists, chosen.weights)
    missing = pc.equal(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False)
    if fallback is not None and missing.any():
        others, _ = _joined([as_lists(table[fallback], source, fallback)], None)
        pick = np.where(missing, np.arange(len(texts)) + len(texts), np.arange(len(texts)))
        texts = pa.concat_arrays([texts, others]).take(pa.array(pick))
        if weights is not None:
            equal = _like(others, np.ones(len(others.values)))
            weights = pa.concat_arrays([weights, equal]).take(pa.array(pick))
        missing = pc.equal(pc.list_value_length(texts), 0).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(missing)
    if blank == "error":
        _refuse(source, chosen, rows, len(table))
    if blank == "null" and len(rows):
        empty = pa.array([[""]], texts.type)
        pick = np.where(missing, len(texts), np.arange(len(texts)))
        texts = pa.concat_arrays([texts, empty]).take(pa.array(pick))
        if weights is not None:
            one = pa.array([[1.0]], weights.type)
            weights = pa.concat_arrays([weights, one]).take(pa.array(pick))
    return RowTexts(texts, weights, rows)


def list_rows(rows: Sequence[int] | np.ndarray) -> str:
    """The first of some rows, for a message."""
    shown = ", ".join(str(row) for row in rows[:_NUM_SHOWN])
    more = f" and {len(rows) - _NUM_SHOWN:,} more" if len(rows) > _NUM_SHOWN else ""
    return f"rows {shown}{more}, counted from 0"


def _is_blank(texts: pa.Array) -> pa.Array:
    """A mask, made a block at a time: the trimmed texts are a copy of all of them."""
    blocks = [pa.array([], pa.bool_())]
    for first in range(0, len(texts), _BLOCK):
        trimmed = pc.utf8_trim_whitespace(texts.slice(first, _BLOCK))
        blocks.append(pc.fill_null(pc.equal(pc.utf8_length(trimmed), 0), True))
    return pa.concat_arrays(blocks)


def _blank_rows(lists: pa.ListArray) -> np.ndarray:
    """Rows that are empty, or in which any caption is blank."""
    blank = pc.list_parent_indices(lists).filter(_is_blank(lists.flatten()))
    empty = pc.indices_nonzero(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0))
    return np.union1d(blank.to_numpy(), empty.to_numpy().astype(np.int64))


def _refuse(source: str, chosen: Chosen, rows: np.ndarray, num_rows: int) -> None:
    if len(rows):
        raise InputError(
            f"{source}: {len(rows)} of {num_rows} rows have an empty caption in column "
            f"{chosen.text!r} ({list_rows(rows)}). Leave them out with --blank skip, or store "
            "them as the null caption with --blank null; caption dropout happens in training."
        )


def _joined(
    lists: Sequence[pa.ListArray], weights: Sequence[float] | None
) -> tuple[pa.ListArray, pa.ListArray | None]:
    """Captions of several columns row by row, without blank ones; and their weights.

    Two columns, of rows (a), () and (b c), (d)::

        row    0 1 1 | 1      sorted by row, the first column first:  0 1 1 1
        text   a b c | d                                              a b c d
    """
    num_rows = len(lists[0])
    rows, texts, shares = [], [], []
    for number, each in enumerate(lists):
        flat = each.flatten()
        keep = pc.invert(_is_blank(flat))
        row = pc.list_parent_indices(each).filter(keep).to_numpy()
        rows.append(row)
        texts.append(flat.filter(keep))
        if weights is not None:
            shares.append(weights[number] / np.bincount(row, minlength=num_rows)[row])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    lengths = np.bincount(row, minlength=num_rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    flat = pa.concat_arrays(texts)
    joined = pa.ListArray.from_arrays(offsets, flat if len(lists) == 1 else flat.take(order))
    if weights is None:
        return joined, None
    return joined, _like(joined, np.concatenate(shares)[order])


def _like(lists: pa.ListArray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(lists.offsets, pa.array(values, pa.float64()))
