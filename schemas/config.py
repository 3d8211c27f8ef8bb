"""A training configuration from a YAML file and the command line."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .contract import parse
from .errors import InputError
from .train import TrainConfig
from .yaml_file import MAX_CHARACTERS, YamlMapping, load_yaml


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training configuration from a YAML file, with overrides ``a.b=value``.

    Raises:
        InputError: no such file, not YAML, not a valid configuration, or one with keys that have no
            effect beside others.
    """
    config = parse(TrainConfig, read_yaml(path, overrides), str(path))
    _refuse_unused(config, str(path))
    return config


def _refuse_unused(config: TrainConfig, name: str) -> None:
    """Refuse keys that are not at their default, and that nothing reads.

    Contracts do not: a run of an early version may have been trained with such keys.
    """
    pretrained, validation = config.model.kind == "pretrained", config.validation
    unused = {
        "optimizer.muon_lr": (config.optimizer.name != "muon", "optimizer.name muon"),
        "data.window": (config.data.order != "shards", "data.order shards"),
        "data.unverified": (not pretrained, "model.kind pretrained"),
        **{
            f"validation.{key}": (
                not validation.share and validation.features is None,
                "validation.share, or a second pair of stores",
            )
            for key in ("every", "num_samples", "num_bins", "seed")
        },
        **{
            f"sampling.{key}": (config.sampling.every is None, "sampling.every")
            for key in type(config.sampling).model_fields
            if key != "every"
        },
    }
    for number, select in enumerate([config.data.select, *(s.select for s in config.data.mixture)]):
        if select.columns is not None and select.filter is None and select.caption_weights is None:
            where = f"data.mixture.{number - 1}.select" if number else "data.select"
            raise InputError(
                f"{name}: {where}.columns is given, but nothing reads them: give filter or "
                "caption_weights too, or leave it out"
            )
    for key, (is_unused, needed) in unused.items():
        section, _, field = key.partition(".")
        part = getattr(config, section)
        value = getattr(part, field)
        if is_unused and value != type(part).model_fields[field].default:
            raise InputError(f"{name}: {key} is {value!r}, but needs {needed}: leave it out")


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> YamlMapping:
    """The mapping in a YAML file, with overrides ``a.b=value``.

    Raises:
        InputError: no such file, not YAML, a value that YAML reads otherwise than people do, or not
            a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    values, lines = load_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}; expected keys and values")
    document = YamlMapping(values, lines)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise InputError(f"{override!r}: expected KEY=VALUE, such as routing.strategy=time")
        put(document, key, load_yaml(value, f"{override!r}: the value")[0])
        for line in [line for line in lines if line == key or line.startswith(f"{key}.")]:
            del lines[line]  # the value is no longer the file's
    return document


def put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, such as ``routing.strategy``; a mapping is set key by key.

    Raises:
        InputError: a part of the key before the last holds a value; or an empty mapping, which sets
            nothing.
    """
    if isinstance(value, dict):
        if not value:
            raise InputError(f"{key}={{}} sets no key: give {key}.KEY=VALUE, or leave it out")
        for name, inner in value.items():
            put(document, f"{key}.{name}", inner)
        return
    *parents, last = key.split(".")
    place = document
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"{key}={value}: {parent} holds a value, not keys")
    place[last] = _number_or(value)


def _number_or(value: Any) -> Any:
    """A number where YAML 1.1 sees a string, as in 1e-3; other values unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
            return number if math.isfinite(number) else value
    return value
