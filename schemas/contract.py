"""Base of all contracts: strict fields, errors that name the remedy, comparison key by key."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import InputError
from .yaml_file import YamlMapping

MAX_NUMBER = 2**31 - 1
"""Largest whole number of most things: what a 32-bit integer of PyTorch holds."""
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ContractError(InputError):
    """A document does not satisfy its contract; the message lists every key that is wrong."""


class Contract(BaseModel):
    """Base of documents on disk and of requests: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(Contract):
    """Base of documents that people write: numbers are finite, and are no booleans; texts are not
    blank."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_blank_text(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("expected text that is not blank; leave the key out for its default")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        accepted = _leaf_types(field.annotation)
        if accepted & {int, float} and not accepted & {bool, Any} and _holds_boolean(value):
            raise ValueError(
                "expected a number, not a boolean, which is also how YAML reads yes, no, on and off"
            )
        return value


def _leaf_types(annotation: Any) -> set[Any]:
    """The types inside an annotation: ``list[float] | None`` -> float, None's."""
    inner = [each for each in get_args(annotation) if isinstance(each, type) or get_args(each)]
    inner += [each for each in get_args(annotation) if each is Any]
    return set().union(*map(_leaf_types, inner)) if inner else {annotation}


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_boolean, value))
    return isinstance(value, bool)


class Difference(NamedTuple):
    """A key whose values differ: dotted key, value found, value expected."""

    key: str
    found: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.found)} instead of {_short(self.expected)}"


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], document: Any, name: str) -> M:
    """Validate ``document`` against ``model``.

    Args:
        document: normally a mapping, as it was read; problems in a :class:`YamlMapping` are
            reported with their lines.
        name: of the document in messages, for example its path.

    Raises:
        ContractError: with one line per problem; for an unknown key, with the nearest known one.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        lines = [_explain(model, problem, document) for problem in error.errors()]
    raise ContractError("\n  ".join([f"{name} is not valid:", *lines]))


def differences(found: Any, expected: Any, prefix: str = "") -> list[Difference]:
    """All leaves that differ between two contracts or plain documents, in key order."""
    found, expected = _plain(found), _plain(expected)
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        keys = sorted({*found, *expected})
        return [
            difference
            for key in keys
            for difference in differences(
                found.get(key), expected.get(key), f"{prefix}.{key}" if prefix else str(key)
            )
        ]
    return [] if found == expected else [Difference(prefix, found, expected)]


def refuse_differences(
    different: Iterable[Difference | str],
    what: str,
    remedy: str,
    error: type[InputError] = InputError,
) -> None:
    """Raise an error that lists differences, one key per line; do nothing if there are none.

    Args:
        different: of :func:`differences`, or lines.
        what: beginning of the message, which says whose the two values are; the list follows it.
        remedy: what to do, the last line of the message.
        error: class of the error.
    """
    lines = [str(each) for each in different]
    if lines:
        raise error("\n  ".join([f"{what}:", *lines]) + f"\n{remedy}")


def flat(document: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a contract or plain document, by dotted key; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in _plain(document).items():
        if isinstance(value, Mapping):
            leaves |= {f"{key}.{inner}": leaf for inner, leaf in flat(value).items()}
        else:
            leaves[key] = value
    return leaves


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _explain(model: type[BaseModel], problem: Any, document: Any) -> str:
    location = problem["loc"]
    line = document.line(location) if isinstance(document, YamlMapping) else None
    key = ".".join(str(part) for part in location)
    if line is not None:
        key = f"line {line}: {key}"
    if problem["type"] != "extra_forbidden":
        hint = _quoting_hint(problem["type"], problem["input"])
        return f"{key}: {problem['msg']} (found {_short(problem['input'])}){hint}"
    known = _known_keys(model, location[:-1])
    nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


def _quoting_hint(problem: str, value: Any) -> str:
    """What to do about a value that YAML made of text without quotes."""
    if problem not in ("literal_error", "string_type"):
        return ""
    if isinstance(value, bool):
        return (
            "; YAML reads no, off, yes and on as booleans: quote the text, as in "
            f'"{"yes" if value else "no"}"'
        )
    if problem == "string_type" and isinstance(value, (int, float, date)):
        return f'; quote it if it is text, as in "{value}"'
    return ""


def _known_keys(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)


def render(contract: Contract, *, early: bool = False) -> str:
    """The JSON text of a contract, one key per line; ``early`` as for :func:`digest`."""
    return contract.model_dump_json(indent=1, exclude_unset=early) + "\n"


def digest(contract: Contract, *, early: bool = False) -> str:
    """sha256 of a contract as it is written.

    Args:
        early: the contract was read, perhaps from the file of an early version: leave out keys that
            were not in the file.
    """
    return hashlib.sha256(render(contract, early=early).encode()).hexdigest()
