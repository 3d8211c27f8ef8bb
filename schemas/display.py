"""Titled facts and tables, as text and as HTML, for reprs and reports; what they hold may be a
stranger's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .escaping import in_html, one_line


@dataclass(frozen=True)
class Summary:
    """Names and values under a title; ``str()`` aligns them, notebooks show a table."""

    title: str
    items: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.items), default=0)
        lines = [
            f"  {one_line(name):<{width}}  {one_line(value)}" for name, value in self.items.items()
        ]
        return "\n".join([one_line(self.title), *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{in_html(name)}</th>"
            f"<td style='text-align:left'>{in_html(value)}</td></tr>"
            for name, value in self.items.items()
        )
        return f"<div><strong>{in_html(self.title)}</strong><table>{rows}</table></div>"


@dataclass(frozen=True, repr=False)
class Report:
    """Findings about a store or a plan, for people and for machines.

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


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head, as aligned text (``str()``), HTML or Markdown.

    Attributes:
        rows: the head, then the other rows.
        num_words: number of first columns that hold words, and are aligned left in text; the other
            columns are aligned right.
    """

    rows: Sequence[Sequence[str]]
    num_words: int = 1

    def __str__(self) -> str:
        rows = [[one_line(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if number < self.num_words else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def to_html(self) -> str:
        """An HTML table with a head; every cell is escaped."""
        head, *others = self.rows
        lines = ["".join(f"<th>{in_html(cell)}</th>" for cell in head)]
        lines += ["".join(f"<td>{in_html(cell)}</td>" for cell in row) for row in others]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    def to_markdown(self) -> list[str]:
        """Lines of a Markdown table; cells may hold Markdown."""
        head, *others = (f"| {' | '.join(map(one_line, row))} |" for row in self.rows)
        return [head, "| --- " * len(self.rows[0]) + "|", *others]
