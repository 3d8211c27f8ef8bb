"""Values of files that people write: line ends, byte order marks, and the type of a column."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from ...schemas import InputError

BOM = b"\xef\xbb\xbf"


class RepeatedKeys(dict[str, Any]):
    """A JSON object with a key that is there twice.

    Attributes:
        repeated: these keys.
    """

    repeated: set[str]


def parse_json(content: str | bytes) -> Any:
    """A JSON document; objects with a repeated key are :class:`RepeatedKeys`."""
    return json.loads(content, object_pairs_hook=_json_object)


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    marked = RepeatedKeys(document)
    names = [name for name, _ in pairs]
    marked.repeated = {name for name in names if names.count(name) > 1}
    return marked


def decode(content: bytes, where: str) -> str:
    """UTF-8 without its byte order mark.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}. Save the file as UTF-8.") from error


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that end in LF, CRLF or CR, without their ends and without a byte order mark."""
    first = True
    for part in file:
        yield from (part.removeprefix(BOM) if first else part).splitlines()
        first = False


def read_objects(file: BinaryIO, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of jsonl as text and as an object; empty lines are skipped.

    Raises:
        InputError: a line is not UTF-8 or not an object.
    """
    row = 0
    for line in read_lines(file):
        text = decode(line, f"{source}: row {row} (counted from 0)").strip()
        if not text:
            continue
        try:
            document = parse_json(text)
        except ValueError as error:
            raise InputError(
                f"{source} is not a readable jsonl file: row {row} (counted from 0) is not JSON: "
                f"{error}; found {text[:60]!r}"
            ) from error
        if not isinstance(document, dict):
            raise InputError(
                f"{source}: row {row} (counted from 0): a line of jsonl must be an object; found "
                f"{text[:60]!r}"
            )
        yield text, document
        row += 1


def check_not_repeated(document: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Refuse an object that has one of these keys twice."""
    if isinstance(document, RepeatedKeys):
        repeated = sorted(document.repeated & {*names})
        if repeated:
            raise InputError(
                f"{where}: the object has the key {repeated[0]!r} twice; expected it once"
            )


def to_array(values: list[Any], name: str, where: Callable[[int], str]) -> pa.Array:
    """A column of JSON values, its type taken from all of them.

    Args:
        values: one per row.
        name: of the column, for messages.
        where: file and row of a value by its position, for messages.

    Raises:
        InputError: values of several types, or text that is not Unicode.
    """
    try:
        return pa.array(values)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise InputError(_mismatch(values, name, where) or f"column {name!r}: {error}") from error


def _mismatch(values: list[Any], name: str, where: Callable[[int], str]) -> str | None:
    """What is wrong with the first value that cannot stand in a column with the first one."""
    first = None
    for row, value in enumerate(values):
        try:
            pa.array([first, value])
        except UnicodeEncodeError as error:
            return (
                f"{where(row)}: {name!r} has half a surrogate pair, as of an emoji that was cut "
                f"in two: {error}. Remove it or write the whole character."
            )
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            return (
                f"{where(row)}: {name!r} is {json.dumps(value)[:60]}, expected a value like "
                f"{json.dumps(first)[:60]} of an earlier row: {error}. Give all rows values of "
                "one type."
            )
        first = value if first is None else first
    return None


def not_utf8(column: pa.ChunkedArray) -> int | None:
    """The first row of a column of strings or of lists of them that is not UTF-8."""
    row = 0
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid:
            for number, scalar in enumerate(chunk):
                try:
                    scalar.as_py()
                except UnicodeDecodeError:
                    return row + number
        row += len(chunk)
    return None
