"""Pages that are made from the contracts, so that they cannot say anything else.

A contract's fields are documented by the string under each field; their types, bounds and defaults
come from the JSON Schema that pydantic derives from the same class.
"""

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel

from semroute import schemas
from semroute.pipeline.extraction.requests import (
    ConditioningRequest,
    ExtractRequest,
    LatentsRequest,
    RewriteRequest,
)
from semroute.trainer.model.blocks import SIZES

SCHEMAS: dict[str, type[BaseModel]] = {
    "feature-manifest": schemas.FeatureManifest,
    "latent-manifest": schemas.LatentManifest,
    "conditioning-manifest": schemas.ConditioningManifest,
    "against": schemas.Against,
    "budget": schemas.StoreBudget,
    "position": schemas.RunPosition,
    "checksums": schemas.Checksums,
    "receipt": schemas.Receipt,
    "quarantine": schemas.Quarantine,
    "run": schemas.RunRecord,
    "checkpoint-state": schemas.CheckpointState,
    "checkpoint-files": schemas.CheckpointFiles,
    "router": schemas.RouterRecord,
    "pictures": schemas.ImageSetRecord,
    "judge": schemas.JudgeRecord,
    "train-config": schemas.TrainConfig,
}
"""Documents on disk -> their contract; each becomes a JSON Schema and a table of keys."""

REQUESTS: dict[str, type[BaseModel]] = {
    "extract-request": ExtractRequest,
    "latents-request": LatentsRequest,
    "conditioning-request": ConditioningRequest,
    "rewrite-request": RewriteRequest,
}
"""Requests of the jobs that write stores; each becomes a table of keys."""

UNFOLDED_ELSEWHERE = (schemas.TrainConfig, schemas.FeatureIdentity, schemas.LatentIdentity)
"""Contracts that have a table of their own, and are only named inside ``run.json``."""


class Field(NamedTuple):
    """One key of a document.

    Attributes:
        key: dotted, from the document's top.
        type: in words.
        default: as JSON, or None where there is none to choose.
        text: what the string under the field says; empty where there is none.
    """

    key: str
    type: str
    default: str | None
    text: str


def write_reference(folder: Path) -> None:
    """Write every JSON Schema, every table of keys and the table of sizes."""
    for name, model in SCHEMAS.items():
        schema = json.dumps(json_schema(model), indent=1, ensure_ascii=False)
        _write(folder / f"{name}.json", schema)
        stop = UNFOLDED_ELSEWHERE if model is schemas.RunRecord else ()
        _write(folder / f"{name}.md", to_table(list(fields(model, stop=stop))))
    for name, model in REQUESTS.items():
        _write(folder / f"{name}.md", to_table(list(fields(model, stop=(schemas.Routing,)))))
    _write(folder / "sizes.md", sizes_table())


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a contract, described by the strings under its fields.

    pydantic would read them when it makes a class: a third of the time to import ``schemas``.
    """
    schema = model.model_json_schema()
    classes = {each.__name__: each for each in _contracts(schemas.Contract)}
    for name, part in {model.__name__: schema, **schema.get("$defs", {})}.items():
        for field, text in field_texts(classes[name]).items() if name in classes else ():
            if text and field in part["properties"]:
                described = part["properties"][field]
                part["properties"][field] = {"description": text, **described}
    return schema


def _contracts(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield base
    for each in base.__subclasses__():
        yield from _contracts(each)


def fields(
    model: type[BaseModel], prefix: str = "", stop: tuple[type[BaseModel], ...] = ()
) -> Iterator[Field]:
    """All keys of a contract, those of nested contracts unfolded.

    Args:
        prefix: of every key.
        stop: contracts that are named but not unfolded.
    """
    schema = model.model_json_schema()
    texts = field_texts(model)
    for name, info in model.model_fields.items():
        nested = info.annotation
        parts = [part for part in get_args(nested) if part is not type(None)]
        nested = parts[0] if len(parts) == 1 and isinstance(nested, UnionType) else nested
        is_contract = isinstance(nested, type) and issubclass(nested, BaseModel)
        if is_contract and nested not in stop:
            yield from fields(nested, f"{prefix}{name}.", stop)
            continue
        described = schema["properties"][name]
        free = not info.is_required() and "const" not in described
        default = (
            json.dumps(info.get_default(call_default_factory=True), ensure_ascii=False)
            if free
            else None
        )
        yield Field(prefix + name, describe(described), default, texts[name])


def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """Field, inherited ones too -> the string literal under it in the source, on one line."""
    texts = dict.fromkeys(model.model_fields, "")
    for base in reversed(model.__mro__):
        if not base.__module__.startswith("semroute.") or "[" in base.__name__:
            continue  # a generic base has its source under its plain name
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[node.target.id] = _to_markdown(str(after.value.value))
    return texts


def _to_markdown(text: str) -> str:
    """One line, whose code and references are code."""
    return re.sub(r":\w+:(?=`)", "", " ".join(text.split()).replace("``", "`"))


def describe(schema: Mapping[str, Any]) -> str:
    """A property of a JSON Schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(describe, schema["anyOf"])))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            first = schema["prefixItems"][0]
            return f"list of {len(schema['prefixItems'])} {_plural(describe(first))}"
        case "array":
            return f"list of {_plural(describe(schema['items']))}"
        case "object" if schema["additionalProperties"] is True:
            return "map"
        case "object":
            return f"map to {describe(schema['additionalProperties'])}"
        case "integer" | "number" as kind:
            return kind + _bounds(schema)
        case kind:
            return str(kind)


def to_table(listed: list[Field]) -> str:
    """A Markdown table; the column of defaults only where there is one."""
    has_defaults = any(field.default is not None for field in listed)
    head = ["key", "type", *(["default"] if has_defaults else []), "meaning"]
    rows = []
    for key, kind, default, text in listed:
        shown = "required" if default is None else f"`{default}`"
        rows.append([f"`{key}`", kind, *([shown] if has_defaults else []), text])
    return _markdown(head, rows)


def sizes_table() -> str:
    """The named sizes of the DiT."""
    names = [*SIZES["nano"].__dataclass_fields__]
    rows = [
        [f"`{size}`", *(f"{getattr(numbers, name):,}" for name in names)]
        for size, numbers in SIZES.items()
    ]
    return _markdown(["size", *(f"`{name}`" for name in names)], rows)


def _plural(words: str) -> str:
    """``number, at least 0`` -> ``numbers, at least 0``; literals stay as they are."""
    return re.sub(r"^\w+", r"\g<0>s", words)


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    if low is not None:
        return f", at least {low:g}"
    if "exclusiveMinimum" in schema:
        return f", above {schema['exclusiveMinimum']:g}"
    return ""


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
                     for line in lines)  # fmt: skip


def _write(path: Path, text: str) -> None:
    """Only where it changed, so that Sphinx rebuilds only what it must."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text + "\n":
        path.write_text(text + "\n", "utf-8")
