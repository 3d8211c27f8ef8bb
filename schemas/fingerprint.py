"""Fingerprint of texts: equal for equal texts in equal order."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_BLOCK = 65_536  # rows that are framed at a time


def fingerprint(rows: pa.Array | pa.ChunkedArray | Iterable[Sequence[str] | str]) -> str:
    """sha256 over rows of texts, each text preceded by its length in bytes so that none can run
    into the next.

    Args:
        rows: texts, or lists of texts; as Arrow arrays (faster) or Python objects.
    """
    digest = hashlib.sha256()
    if isinstance(rows, pa.Array | pa.ChunkedArray):
        for first in range(0, len(rows), _BLOCK):
            block = rows.slice(first, _BLOCK)
            block = block.combine_chunks() if isinstance(block, pa.ChunkedArray) else block
            digest.update(_framed(block).data)
        return digest.hexdigest()
    for row in rows:
        texts = (row,) if isinstance(row, str) else row
        digest.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def _framed(rows: pa.Array) -> np.ndarray:
    """The bytes to hash: each row's number of texts, then each text after its length.

    Numbers take 8 bytes. Two rows, ["ab", "c"] and ["def"]::

        place    0   8   16   18   26   27   35   43
        bytes    2 | 2 | ab | 1 |  c  | 1 | 3 | def

    so a row's count stands at 8 * (earlier rows + earlier texts) + bytes of earlier texts, and a
    text's length at 8 * (rows up to its own + earlier texts) + the same.
    """
    if pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type):
        counts = pc.list_value_length(rows).to_numpy(zero_copy_only=False).astype(np.int64)
        rows = rows.flatten()
    else:
        counts = np.ones(len(rows), np.int64)
    if rows.null_count:
        raise ValueError(f"{rows.null_count} texts are missing")
    texts = rows.cast(pa.large_string())
    _, starts, content = texts.buffers()
    ends = np.frombuffer(starts, "<i8")[texts.offset : texts.offset + len(texts) + 1]
    sizes, before = np.diff(ends), ends[:-1] - ends[0]
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts  # text of each row
    bytes_before = np.append(before, ends[-1] - ends[0])[first]
    places = np.concatenate(
        [
            8 * (np.arange(len(counts)) + first) + bytes_before,
            8 * (row + 1 + np.arange(len(texts))) + before,
        ]
    )
    numbers = np.concatenate([counts, sizes]).astype("<i8")
    framed = np.empty(8 * len(numbers) + int(sizes.sum()), np.uint8)
    is_text = np.ones(len(framed), bool)
    heads = places[:, None] + np.arange(8)
    framed[heads], is_text[heads] = numbers.view(np.uint8).reshape(-1, 8), False
    if content is not None:
        framed[is_text] = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    return framed
