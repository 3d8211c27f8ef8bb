"""What a repr says: titled facts, the same in text and in HTML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Summary:
    """Names and values under a title; ``str()`` aligns them, notebooks show a table."""

    title: str
    items: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.items), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in self.items.items()]
        return "\n".join([self.title, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self.items.items()
        )
        return f"<div><strong>{escape(self.title)}</strong><table>{rows}</table></div>"


@dataclass(frozen=True, repr=False)
class Report:
    """What a look at a store found, twice.

    Attributes:
        facts: for people.
        details: the same and more, for machines; plain JSON types.
    """

    facts: Summary
    details: Mapping[str, Any]

    def __repr__(self) -> str:
        return str(self.facts)

    def _repr_html_(self) -> str:
        return self.facts._repr_html_()

    def to_json(self) -> str:
        return json.dumps(self.details, indent=1)


def align(rows: Sequence[Sequence[str]], num_words: int) -> str:
    """A table as text: the first columns, of words, to the left, and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < num_words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def to_html(rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML, the first row being the head; every cell is escaped."""
    lines = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
