"""Files of prompts as benchmarks publish them: texts with their names and groups."""

from collections.abc import Sequence
from typing import Any

import fsspec

from ...schemas import InputError, Prompt
from ...schemas.files import StorageError, answer, reaching
from ...schemas.urls import check_protocol, suffix_of
from .formats import open_file
from .places import SUFFIXES, find_files
from .table import column_names, read_samples, read_table
from .values import parse_json, read_objects, to_array

TEXT_COLUMNS = ("prompt", "prompts", "text", "caption")
GROUP_COLUMNS = ("tag", "category")
ID_COLUMNS = ("id",)


def read_prompts(source: str, text_column: str | None = None) -> list[Prompt]:
    """Read prompts, in the order of their file.

    Args:
        source: a table or a list of lines, see
            :func:`semroute.pipeline.sources.table.read_samples`; or a ``.json``: a list of
            prompts, or an object of names and prompts as in GenAI-Bench, where a prompt is a string
            or an object that contains one.
        text_column: default: the first of ``prompt``, ``prompts``, ``text`` and ``caption``, in
            upper or lower case.

    Raises:
        InputError: no such file or format, no column of prompts, or an empty prompt.
    """
    if suffix_of(source, SUFFIXES) == ".json":
        return _read_json(source, text_column)
    names = column_names(source)
    text_column = text_column or _find(names, TEXT_COLUMNS)
    samples = read_samples(source, text_column=text_column, need="text")
    captions = samples.texts().to_pylist()
    several = next((row for row, texts in enumerate(captions) if len(texts) > 1), None)
    if several is not None:
        raise InputError(
            f"{source}: row {several} has {len(captions[several])} captions; expected one per "
            "prompt"
        )
    columns = {
        key: _find(names, known) for key, known in (("group", GROUP_COLUMNS), ("name", ID_COLUMNS))
    }
    values: dict[str, list[Any]] = {}
    for key, column in columns.items():
        if column is not None:
            _, table = read_table(source, samples.text_column, [column])
            values[key] = [None if v is None else str(v) for v in table[column].to_pylist()]
    records: Sequence[str | None] = [None] * len(captions)
    files = find_files(source)
    if files.kind == ".jsonl":
        lines: list[str | None] = []
        for path in files.paths:
            with open_file(path) as file:
                lines += [line for line, _ in read_objects(file, path)]
        records = lines
    return [
        Prompt(
            text=texts[0],
            name=(values["name"][row] if "name" in values else None) or f"{row:05d}",
            group=values["group"][row] if "group" in values else None,
            record=records[row],
        )
        for row, texts in enumerate(captions)
    ]


def _read_json(source: str, text_column: str | None) -> list[Prompt]:
    check_protocol(source)
    try:
        with reaching(source), fsspec.open(source, "rb") as file:
            document = parse_json(file.read())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{source}: no such file{answer(error)}") from error
    except StorageError:
        raise
    except ValueError as error:
        raise InputError(f"{source} is not a readable json file: {error}") from error
    if isinstance(document, dict):
        entries = [(str(name), value) for name, value in document.items()]
    elif isinstance(document, list):
        entries = [(f"{row:05d}", value) for row, value in enumerate(document)]
    else:
        entries = []
    if not entries:
        raise InputError(f"{source} has no prompts; expected a list, or an object of them")
    return [_prompt(source, name, value, text_column) for name, value in entries]


def _prompt(source: str, name: str, value: Any, text_column: str | None) -> Prompt:
    group = None
    if isinstance(value, dict):
        column = text_column or _find([*value], TEXT_COLUMNS)
        group_column = _find([*value], GROUP_COLUMNS)
        group = str(value[group_column]) if group_column is not None else None
        value = value.get(column) if column is not None else None
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{source}: entry {name} has no prompt; expected a string, or an object with "
            f"{text_column or ', '.join(TEXT_COLUMNS)}"
        )
    to_array([value, name, group], "prompt", lambda _: f"{source}: entry {name!r}")
    return Prompt(value, name, group)


def _find(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of the known names that exists, in upper or lower case."""
    lower = {name.casefold(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)
