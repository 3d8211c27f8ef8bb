"""Labels of captions from the columns of a table, for linear probes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...schemas import InputError
from .table import read_table
from .values import parse_json

MIN_CAPTIONS = 20
"""Fewest captions of a class; with fewer no accuracy can be measured."""
MAX_CLASSES = 64
"""Most classes of a label that was not named. With more it is an identifier rather than a label."""


@dataclass(frozen=True)
class Label:
    """One label of captions.

    Attributes:
        name: column, with dots into JSON objects, lists and structs: ``scene.objects.0.colour``.
        classes: sorted, at least two.
        values: class of each caption by position, int64 ``[N]``; -1 where it has none.
        num_rare: captions left out because their class has fewer than ``MIN_CAPTIONS``.
        num_ambiguous: captions left out because two rows of the table label them differently.
    """

    name: str
    classes: list[str]
    values: np.ndarray
    num_rare: int = 0
    num_ambiguous: int = 0

    def __len__(self) -> int:
        return int(np.count_nonzero(self.values >= 0))


def classify(name: str, values: Sequence[str | None], num_ambiguous: int = 0) -> Label | None:
    """Number the classes of a label; None where fewer than two have ``MIN_CAPTIONS`` captions."""
    counts = Counter(value for value in values if value is not None)
    classes = sorted(value for value, count in counts.items() if count >= MIN_CAPTIONS)
    if len(classes) < 2:
        return None
    index = {value: number for number, value in enumerate(classes)}
    numbers = np.array([-1 if value is None else index.get(value, -1) for value in values])
    num_rare = counts.total() - int(np.count_nonzero(numbers >= 0))
    return Label(name, classes, numbers, num_rare, num_ambiguous)


def read_labels(
    source: str,
    texts: Sequence[str],
    *,
    text_column: str | None = None,
    names: Sequence[str] = (),
) -> tuple[list[Label], list[str]]:
    """Read labels of captions.

    Args:
        source: a table as :func:`semroute.pipeline.sources.table.read_samples` reads it, but not
            tars: a column of captions or of lists of them, and columns of strings, numbers,
            booleans, structs or JSON objects. Nulls and empty strings are not labels.
        texts: captions to label, N.
        names: labels wanted, as ``Label`` names them, or columns with labels. Default: all of at
            most ``MAX_CLASSES`` classes.

    Returns:
        The labels, and the reason why each of the others cannot be used.

    Raises:
        InputError: no such file, column or label, no caption in common, or no usable label.
    """
    columns = sorted({name.split(".")[0] for name in names})
    text, table = read_table(source, text_column, columns or None)
    by_label: dict[str, dict[str, str]] = {}  # label -> caption -> value
    distinct: dict[str, set[str]] = {}  # label -> its values
    ambiguous: dict[str, set[str]] = {}  # label -> captions that have two values
    wanted_texts, common = set(texts), set()
    for row in table.to_pylist():
        captions = row.pop(text)
        for caption in captions if isinstance(captions, list) else [captions]:
            if caption not in wanted_texts:
                continue
            common.add(caption)
            for name, value in _leaves(row):
                if by_label.setdefault(name, {}).setdefault(caption, value) != value:
                    ambiguous.setdefault(name, set()).add(caption)
                distinct.setdefault(name, set()).add(value)
    if not common:
        raise InputError(
            f"{source}: none of its {table.num_rows:,} captions is among the {len(texts):,} that "
            "are stored; name the column of captions with --text-column"
        )
    for name in names:
        if not any(_is_part(leaf, name) for leaf in by_label):
            raise InputError(
                f"{source} has no label {name!r}; it has {', '.join(sorted(by_label)) or 'none'}"
            )
    labels, reasons = [], []
    for name, by_caption in by_label.items():
        if names and not any(_is_part(name, wanted) for wanted in names):
            continue
        num = len(distinct[name])
        if not names and num > MAX_CLASSES:
            reasons.append(f"{name}: {num:,} values, more than {MAX_CLASSES}")
            continue
        unclear = ambiguous.get(name, set())
        values = [None if one in unclear else by_caption.get(one) for one in texts]
        label = classify(name, values, len(unclear))
        if label is None:
            reasons.append(f"{name}: fewer than two classes of {MIN_CAPTIONS} captions or more")
        else:
            labels.append(label)
    if not labels:
        raise InputError(f"{source} has no label to probe for: " + ("; ".join(reasons) or "none"))
    return labels, reasons


def _is_part(leaf: str, name: str) -> bool:
    return leaf == name or leaf.startswith(f"{name}.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Scalars inside a value, with dotted names; JSON objects in strings are parsed."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):
            value = parse_json(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{name}.{index}")
    elif value is not None and value != "" and not isinstance(value, bytes):
        yield name, str(value)
