"""Values of files that people write: line ends, byte order marks, JSON documents as rows, and the
type of a column."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from ...schemas import InputError

BOM = b"\xef\xbb\xbf"
KEY = "image_path"
"""Column of the keys of an object of objects, which are paths of images in kohya's metadata."""
_LISTS = ("items", "data")  # keys under which a document may hold its list
_CAPTION = "caption"


class RepeatedKeys(dict[str, Any]):
    """A JSON object with a key that is there twice.

    Attributes:
        repeated: these keys.
    """

    repeated: set[str]


def parse_json(content: str | bytes) -> Any:
    """A JSON document; objects with a repeated key are :class:`RepeatedKeys`.

    Raises:
        ValueError: it is none, or is nested too deep.
    """
    try:
        return json.loads(content, object_pairs_hook=_json_object)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deep") from error


def parse_objects(
    texts: Iterable[str | None], names: Iterable[str], kind: str
) -> list[dict[str, Any]]:
    """JSON objects beside samples; empty where there is none.

    Args:
        names: of the files, and kind: what each should be, for messages.

    Raises:
        InputError: another document, or none.
    """
    documents = []
    for text, name in zip(texts, names, strict=True):
        try:
            document = parse_json(text or "{}")
        except ValueError as error:
            raise InputError(f"{name} is not {kind}: {error}") from error
        if not isinstance(document, dict):
            raise InputError(f"{name} must contain an object: {text!r:.60}")
        documents.append(document)
    return documents


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
    """Refuse an object that has one of these keys twice; with dots, those on the way to a part."""
    for name in names:
        repeated = _repeated(document, name.split("."))
        if repeated is not None:
            raise InputError(
                f"{where}: the object has the key {repeated!r} twice; expected it once"
            )


def _repeated(value: Any, parts: Sequence[str]) -> str | None:
    if isinstance(value, list) and parts:
        if parts[0].isdecimal():
            value, parts = value[int(parts[0]) :][:1], parts[1:]
        return next(filter(None, (_repeated(each, parts) for each in value)), None)
    if not isinstance(value, Mapping):
        return None
    for length in range(len(parts), 0, -1):
        key = ".".join(parts[:length])
        if key in value:
            if isinstance(value, RepeatedKeys) and key in value.repeated:
                return key
            return _repeated(value[key], parts[length:])
    return None


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


def check_values(column: pa.ChunkedArray) -> None:
    """Refuse offsets and indices that lead outside the values: a file of Arrow holds them as they
    lie in memory, and no computation looks at them. Text that is not UTF-8 is left to
    :func:`not_utf8`.

    Raises:
        ArrowInvalid: there are some.
    """
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except (pa.ArrowInvalid, UnicodeDecodeError, SystemError) as error:
            # The last two: the message itself holds damaged text.
            if "UTF8" not in str(error):
                raise pa.ArrowInvalid(f"its values are damaged: {error}") from error


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


def read_document(content: bytes, source: str) -> list[dict[str, Any]]:
    """The rows of a JSON document.

    Args:
        content: a list of objects; an object with such a list under ``items`` or ``data``, or with
            only one list; an object of lists of the same length, one per column; an object of
            objects, whose keys become the column ``image_path``; or captions of COCO, of which each
            image becomes a row with all its captions.

    Raises:
        InputError: it is none of these, or not JSON.
    """
    try:
        document = parse_json(decode(content, source))
    except ValueError as error:
        raise InputError(f"{source} is not a readable json file: {error}") from error
    if isinstance(document, dict):
        if isinstance(document.get("images"), list) and isinstance(
            document.get("annotations"), list
        ):
            return _coco(document, source)
        lists = [each for each in document.values() if isinstance(each, list)]
        rows = any(isinstance(each, dict) for column in lists for each in column[:1])
        if lists and len(lists) == len(document) and not rows:
            return _by_column(document, source)
        named = [document[key] for key in _LISTS if isinstance(document.get(key), list)]
        if named or len(lists) == 1:
            return _objects([*named, *lists][0], source)
        return _keyed(document, source)
    if isinstance(document, list):
        return _objects(document, source)
    raise InputError(f"{source} holds {document!r:.60}; expected a list or an object")


def _objects(rows: list[Any], source: str) -> list[dict[str, Any]]:
    for row, each in enumerate(rows):
        if not isinstance(each, dict):
            raise InputError(
                f"{source}: row {row} (counted from 0) is {each!r:.60}; expected an object"
            )
    return rows


def _by_column(document: Mapping[str, list[Any]], source: str) -> list[dict[str, Any]]:
    _check_keys(document, source)
    lengths = {name: len(column) for name, column in document.items()}
    if len({*lengths.values()}) > 1:
        shown = ", ".join(f"{name!r} has {length:,}" for name, length in lengths.items())
        raise InputError(
            f"{source} holds lists of different lengths: {shown}; expected one value per row"
        )
    return [dict(zip(document, row, strict=True)) for row in zip(*document.values(), strict=True)]


def _check_keys(document: Mapping[str, Any], source: str) -> None:
    if isinstance(document, RepeatedKeys):
        raise InputError(f"{source} has the key {min(document.repeated)!r} twice; expected it once")


def _keyed(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    _check_keys(document, source)
    rows = []
    for key, value in document.items():
        if not isinstance(value, dict):
            raise InputError(
                f"{source}: {key!r} is {value!r:.60}; expected an object per image, captions of "
                "COCO, or a list of objects"
            )
        rows.append({KEY: key, **value})
    return rows


def _coco(document: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """Images in their order, each with its captions in theirs."""
    images = _objects(document["images"], source)
    captions: dict[Any, list[Any]] = {}
    for each in _objects(document["annotations"], source):
        captions.setdefault(_id(each, "image_id", source), []).append(each.get(_CAPTION))
    ids = [_id(image, "id", source) for image in images]
    unknown = captions.keys() - {*ids}
    if unknown:
        raise InputError(
            f"{source}: {len(unknown):,} of its annotations' image_id are no id of an image, for "
            f"example {next(iter(unknown))!r}"
        )
    if len({*ids}) != len(images):
        raise InputError(f"{source}: two images have the same id; expected each once")
    pairs = zip(images, ids, strict=True)
    return [{**image, _CAPTION: captions.get(number, [])} for image, number in pairs]


def _id(document: Mapping[str, Any], key: str, source: str) -> int | str:
    value = document.get(key)
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return value
    raise InputError(f"{source}: {key} {value!r:.60} of COCO; expected a whole number or text")
