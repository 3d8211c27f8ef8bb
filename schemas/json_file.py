"""JSON of stores, runs and studies: bounded in size, depth and numbers, each key once."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_file

MAX_BYTES = 32_000_000
"""Largest document that is read."""
MAX_DEPTH = 32
"""Deepest nesting of objects and lists."""
MAX_CONTAINERS = 1_000_000
"""Largest number of objects and lists, each of which takes many times its bytes in memory."""
MAX_INTEGER = 2**64
_DIGITS = re.compile(r"[0-9]{20}")
_SURROGATE = re.compile(r"\\u[dD][89abAB]")


def read_json(path: Path, *, follow: bool = False) -> Any:
    """The JSON document in a file.

    Args:
        follow: the file may be a link, as in the cache of the Hub.

    Raises:
        InputError: it is damaged, or out of bounds; the file is no plain file.
        OSError: no such file, or it cannot be read.
    """
    return load_json(read_file(path, limit=MAX_BYTES, follow=follow), str(path))


def load_json(content: bytes | str, name: str) -> Any:
    """The value of a JSON document.

    Args:
        name: of the document in messages.

    Raises:
        InputError: not JSON; too large or too deeply nested; a key that is given twice; a number of
            more than 64 bits; half a surrogate pair.
    """
    if len(content) > MAX_BYTES:
        raise InputError(
            f"{name} is damaged: {len(content):,} bytes; expected at most {MAX_BYTES:,}"
        )
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        if text.count("[") + text.count("{") > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS:,} objects and lists")
        value = json.loads(text, object_pairs_hook=_object)
        _check(value, has_long_numbers=_DIGITS.search(text) is not None)
        if _SURROGATE.search(text):  # half of a pair cannot be written or shown
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise InputError(f"{name} is damaged: nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:  # not UTF-8, not JSON, or out of bounds
        raise InputError(f"{name} is damaged: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (repeated, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated!r} is given twice")
    return found


def _check(value: Any, *, has_long_numbers: bool) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if has_long_numbers:
            for each in level:
                if type(each) is int and abs(each) >= MAX_INTEGER:
                    raise ValueError(f"the number {str(each)[:12]}... has more than 64 bits")
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    raise ValueError(f"nested more than {MAX_DEPTH} deep")
