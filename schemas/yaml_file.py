"""YAML as people write settings: what is ambiguous, or out of bounds, is refused with its line."""

import math
import re
from collections.abc import Iterator
from typing import Any

from .errors import InputError

MAX_CHARACTERS = 1_000_000
"""Longest text that is read."""
MAX_DEPTH = 32
"""Deepest nesting of mappings and lists."""
MAX_VALUES = 100_000
"""Largest number of keys and values, those behind each alias counted again."""
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep; expected a few levels of keys"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_MAX_DIGITS = 100  # of a whole number, which Python shows up to 4,300 of
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_WORDS = {
    **{"bool": "a boolean", "null": "null", "timestamp": "a date", "int": "a number"},
    **{"float": "a number", "seq": "a list", "map": "a mapping"},
}


class YamlMapping(dict[str, Any]):
    """The mapping in a YAML file.

    Attributes:
        lines: dotted key -> number of its line, counted from 1.
    """

    def __init__(self, values: dict[str, Any], lines: dict[str, int]) -> None:
        super().__init__(values)
        self.lines = lines

    def line(self, location: tuple[Any, ...]) -> int | None:
        """Line of a key, or of the nearest one around it."""
        keys = [*map(str, location)]
        while keys and ".".join(keys) not in self.lines:
            keys.pop()
        return self.lines[".".join(keys)] if keys else None


def load_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML document, and the line of each dotted key.

    Args:
        name: of the document in messages.

    Raises:
        InputError: not YAML; too large or too deeply nested; a key that is given twice or is not
            text; a number that YAML reads otherwise than people do, or that is not finite.
    """
    import yaml

    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"{name} has more than {MAX_CHARACTERS:,} characters; expected settings, of a few "
            "hundred lines: name their file"
        )
    try:
        _check_depth(yaml.parse(text, yaml.SafeLoader), name)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None, {}
            lines: dict[str, int] = {}
            sizes: dict[int, tuple[int, int]] = {}
            _check_nodes(loader, root, name, (), lines, sizes)
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is no YAML: {error}") from error


def _check_depth(events: Iterator[Any], name: str) -> None:
    """Refuse deep nesting before anything recursive sees it."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise InputError(f"{_at(event, name)}: {_TOO_DEEP}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_nodes(
    loader: Any,
    node: Any,
    name: str,
    path: tuple[str, ...],
    lines: dict[str, int],
    sizes: dict[int, tuple[int, int]],
) -> tuple[int, int]:
    """The number of keys and values in a node, and its depth; every problem in it is an error.

    Args:
        path: keys around the node.
        lines: receives the lines of keys.
        sizes: id of a node -> what this returns for it; zeros while the node is being counted.
    """
    import yaml

    if isinstance(node, yaml.ScalarNode):
        _check_scalar(loader, node, name)
        return 1, 0
    if id(node) in sizes:  # behind an alias
        if not sizes[id(node)][0]:
            raise InputError(f"{_at(node, name)}: holds itself, through an alias; write it out")
        return sizes[id(node)]
    sizes[id(node)] = (0, 0)
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        paths = [(*path, key) for key in _check_keys(node, name)]
        for keys, (key, _) in zip(paths, node.value, strict=True):
            lines[".".join(keys)] = key.start_mark.line + 1
    else:
        children = node.value
        paths = [(*path, str(number)) for number in range(len(children))]
    count, depth = 1 + len(children), 1
    for keys, child in zip(paths, children, strict=True):
        inner_count, inner_depth = _check_nodes(loader, child, name, keys, lines, sizes)
        count, depth = count + inner_count, max(depth, 1 + inner_depth)
        if depth > MAX_DEPTH:
            raise InputError(f"{_at(node, name)}: {_TOO_DEEP}")
        if count > MAX_VALUES:
            raise InputError(
                f"{_at(node, name)}: more than {MAX_VALUES:,} values, with aliases written out: "
                "use fewer aliases"
            )
    sizes[id(node)] = (count, depth)
    return sizes[id(node)]


def _check_keys(node: Any, name: str) -> list[str]:
    """The keys of a mapping, each of which is text and occurs once."""
    first: dict[str, int] = {}
    for key, _ in node.value:
        kind = key.tag.rpartition(":")[2]
        if kind not in ("str", "merge"):
            found = _WORDS.get(kind, f"a {kind}")
            shown = repr(key.value) if isinstance(key.value, str) else "the key"
            raise InputError(
                f"{_at(key, name)}: {shown} is {found} in YAML; expected a name: quote it"
            )
        if key.value in first:
            raise InputError(
                f"{_at(key, name)}: {key.value!r} is given again, first in line "
                f"{first[key.value]}; YAML would use only the last: merge them, or delete one"
            )
        first[key.value] = key.start_mark.line + 1
    return [*first]


def _check_scalar(loader: Any, node: Any, name: str) -> None:
    """Refuse a value that is none of its type, or cannot be written, and a number that is read
    otherwise than it looks, or that is not finite."""
    kind, text = node.tag.rpartition(":")[2], node.value
    try:
        value = loader.construct_object(node)
    except (ValueError, LookupError, AttributeError, OverflowError) as error:
        # What PyYAML raises for a tag, written or found, that the text does not suit.
        found = _WORDS.get(kind, f"a {kind}")
        raise InputError(f"{_at(node, name)}: {text!r:.40} is not {found}; quote text") from error
    if _UNWRITABLE.search(text):
        raise InputError(
            f"{_at(node, name)}: {text!a:.60} holds half a surrogate pair or a zero character"
        )
    if kind == "int" and len(text) > _MAX_DIGITS:
        raise InputError(f"{_at(node, name)}: {text:.12}... has {len(text):,} digits")
    if (node.style is None or kind == "int") and _LEADING_ZERO.fullmatch(text):
        octal = f"octal in YAML, {value}" if isinstance(value, int) else "not a number in YAML"
        raise InputError(
            f"{_at(node, name)}: {text} is {octal}; leave out the leading zero, or quote it if it "
            "is text"
        )
    if kind in ("int", "float") and _SEXAGESIMAL.fullmatch(text):
        raise InputError(
            f"{_at(node, name)}: {text} is a number of base 60 in YAML, "
            f"{value}; quote it if it is a time or other text"
        )
    if kind == "float" and not math.isfinite(value):
        raise InputError(
            f"{_at(node, name)}: {text} is not finite; expected a finite number, or quotes around "
            "text"
        )


def _at(place: Any, name: str) -> str:
    return f"{name}, line {place.start_mark.line + 1}"
