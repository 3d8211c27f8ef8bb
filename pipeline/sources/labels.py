"""What captions are about: labels from the columns of a table, for linear probes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...schemas import InputError
from .table import read_table

LEAST = 20
"""Captions that a class must have to be a class; with fewer no accuracy can be told."""
MOST_CLASSES = 64
"""Of a label that nobody named. With more it is an identifier rather than a label."""


@dataclass(frozen=True)
class Label:
    """One thing to know about captions.

    Attributes:
        name: column, with dots into JSON objects, lists and structs: ``scene.objects.0.colour``.
        classes: sorted, at least two.
        values: class of each caption by position, int64 ``[N]``; -1 where it has none.
        num_rare: captions left out because their class has fewer than ``LEAST``.
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
    """Number the classes of a label; None where fewer than two have ``LEAST`` captions."""
    counts = Counter(value for value in values if value is not None)
    classes = sorted(value for value, count in counts.items() if count >= LEAST)
    if len(classes) < 2:
        return None
    number = {value: index for index, value in enumerate(classes)}
    numbers = np.array([-1 if value is None else number.get(value, -1) for value in values])
    num_rare = counts.total() - int(np.count_nonzero(numbers >= 0))
    return Label(name, classes, numbers, num_rare, num_ambiguous)


def read_labels(
    source: str,
    texts: Sequence[str],
    *,
    text_column: str | None = None,
    names: Sequence[str] = (),
) -> tuple[list[Label], list[str]]:
    """Labels of captions.

    Args:
        source: a table as :func:`semroute.pipeline.sources.table.read_samples` reads it, no tars: a
            column of captions, others of strings, numbers, booleans, structs or JSON objects. Null
            and empty strings are no label.
        texts: captions to be labelled, N.
        names: labels wanted, as ``Label`` names them, or the column that holds them. Default: all
            of at most ``MOST_CLASSES`` classes.

    Returns:
        The labels, and why others are none: a line each.

    Raises:
        InputError: no such file, column or label, no caption in common, or no usable label.
    """
    columns = sorted({name.split(".")[0] for name in names})
    text, table = read_table(source, text_column, columns or None)
    known: dict[str, dict[str, str]] = {}
    found: dict[str, set[str]] = {}
    place = {caption: index for index, caption in enumerate(texts)}
    ambiguous: dict[str, set[str]] = {}
    common = set()
    for row in table.to_pylist():
        caption = row.pop(text)
        if caption not in place:
            continue
        common.add(caption)
        for name, value in _leaves(row):
            if known.setdefault(name, {}).setdefault(caption, value) != value:
                ambiguous.setdefault(name, set()).add(caption)
            found.setdefault(name, set()).add(value)
    if not common:
        raise InputError(
            f"{source}: none of its {table.num_rows:,} captions is among the {len(texts):,} that "
            "are stored; name the column of captions with --text-column"
        )
    for name in names:
        if not any(_is_part(leaf, name) for leaf in known):
            raise InputError(f"{source} has no label {name!r}; it has {', '.join(sorted(known))}")
    labels, reasons = [], []
    for name, by_caption in known.items():
        if names and not any(_is_part(name, wanted) for wanted in names):
            continue
        num = len(found[name])
        if not names and num > MOST_CLASSES:
            reasons.append(f"{name}: {num:,} values, more than {MOST_CLASSES}")
            continue
        unclear = ambiguous.get(name, set())
        values = [None if one in unclear else by_caption.get(one) for one in texts]
        label = classify(name, values, len(unclear))
        if label is None:
            reasons.append(f"{name}: fewer than two classes of {LEAST} captions or more")
        else:
            labels.append(label)
    if not labels:
        raise InputError(f"{source} has no label to probe for: " + ("; ".join(reasons) or "none"))
    return labels, reasons


def _is_part(leaf: str, name: str) -> bool:
    return leaf == name or leaf.startswith(f"{name}.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Scalars under a value, with dotted names; JSON objects in strings are gone into."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{name}.{index}")
    elif value is not None and value != "" and not isinstance(value, bytes):
        yield name, str(value)
