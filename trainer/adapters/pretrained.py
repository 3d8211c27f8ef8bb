"""Pretrained transformers found, identified and loaded: a pipeline of diffusers, in a folder or on
the Hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...pipeline.models.hub import LOAD_ERRORS, download, hash_file, hub_name, is_hub_id
from ...pipeline.models.weights import SAFETENSORS, check_files, refuse_misread
from ...schemas import (
    InputError,
    ModelConfig,
    PretrainedIdentity,
    differences,
    refuse_differences,
)
from ...schemas.json_file import read_json
from .base import Family
from .families import find_family

_INDEX = "model_index.json"
_FILES = [_INDEX, "scheduler/*.json", "transformer/*.json", "transformer/*.safetensors"]
_FROZEN = ("fusion", "router", "gain", "lora", "router+lora")
"""Values of ``model.train`` under which the published weights stay as they are."""


@dataclass(frozen=True)
class Pretrained:
    """A pretrained transformer on this machine.

    Attributes:
        name: names it again: ``ORG/NAME@COMMIT`` or a folder.
        folder: of the transformer.
        index: ``model_index.json``; empty if the folder is that of a transformer alone.
        config: ``config.json`` of the transformer.
        scheduler: ``scheduler_config.json``; empty if there is none.
        family: of the transformer.
    """

    name: str
    folder: Path
    index: Mapping[str, Any]
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    family: Family

    def text_files(self) -> Mapping[str, str]:
        """sha256 of the files of the pipeline's text encoders, and of its tokenizers' states."""
        from ...pipeline.models.text_pipelines import find_text_pipeline

        return find_text_pipeline(self.name, "model.pretrained").files

    def identity(self, model: ModelConfig, num_llm_layers: int) -> PretrainedIdentity:
        """What resuming and sampling compare; every file of weights is read for its digest."""
        layers = model.base_layers or self.family.base_layers(
            num_llm_layers, self.index, self.config
        )
        files = sorted(p for p in self.folder.iterdir() if p.suffix == ".safetensors")
        return PretrainedIdentity(
            family=self.family.name,
            pipeline=self.index.get("_class_name"),
            transformer=self.config["_class_name"],
            base_layers=layers,
            scheduler=dict(self.scheduler),
            config=dict(self.config),
            files={p.name: hash_file(p) for p in (self.folder / "config.json", *files)},
        )

    def check_files(self, identity: PretrainedIdentity, names: Sequence[str]) -> None:
        """Refuse files that are not those of the network that a run adapted.

        Raises:
            InputError: with the names of those that differ.
        """
        refuse_differences(
            differences(
                {name: hash_file(self.folder / name) for name in names},
                {name: identity.files.get(name) for name in names},
            ),
            f"{self.name} is not the pretrained network of the run; found, against the run's own",
            "Name that one.",
        )


def find_pretrained(name: str) -> Pretrained:
    """Locate a pretrained transformer: the folder of a pipeline or of a transformer, or a hub id.

    Raises:
        InputError: no such model, no safetensors, or one of an unknown family.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder, found = path.resolve(), str(path.resolve())
    elif is_hub_id(name):
        folder = download(name, _FILES, "model.pretrained")
        found = hub_name(name, folder)
    else:
        raise InputError(
            f"model.pretrained {name}: no such folder, and not a hub id (org/name or "
            "org/name@revision)"
        )
    index = _read(folder / _INDEX)
    second = (index.get("transformer_2") or [None])[0]
    if second is not None:
        raise InputError(
            f"{name} has two transformers, one for each end of the noise levels (as Wan 2.2 "
            "A14B), of "
            "which one run would learn half a route: expected a pipeline with one"
        )
    inner = folder / "transformer" if index else folder
    config = _read(inner / "config.json")
    if "_class_name" not in config:
        raise InputError(
            f"model.pretrained {name}: {inner / 'config.json'} names no class of diffusers; "
            "expected "
            f"the folder of a pipeline, with {_INDEX} and transformer/"
        )
    family = find_family(config["_class_name"], name, index.get("_class_name"))
    files = [p for p in inner.iterdir() if p.suffix == SAFETENSORS]
    if not files:
        raise InputError(f"model.pretrained {name}: {inner} has no .safetensors")
    check_files(inner, files, f"model.pretrained {name}")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    return Pretrained(found, inner, index, config, scheduler, family)


def hub_id(name: str) -> str | None:
    """The hub id, without its revision, that names a pretrained model; None if it is a folder."""
    if Path(name).expanduser().is_dir() or not is_hub_id(name):
        return None
    return name.partition("@")[0]


def find_class(name: str) -> Any:
    """A class of diffusers.

    Raises:
        InputError: diffusers is not installed, or has no such class.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise InputError(
            f"pretrained transformers need diffusers ({error}): pip install 'semroute[adapters]'"
        ) from error
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise InputError(
            f"diffusers {diffusers.__version__} has no {name}: pip install -U diffusers"
        )
    return cls


def load_transformer(pretrained: Pretrained, config: ModelConfig, *, weights: bool = True) -> Any:
    """The transformer, with its weights.

    Args:
        weights: load them; otherwise the transformer has fresh ones, or none if the caller makes
            it on the meta device.

    Raises:
        InputError: diffusers is missing or cannot load it; weights are missing in its files, or
            are there and not used.
    """
    cls = find_class(pretrained.config["_class_name"])
    try:
        if not weights:
            return cls.from_config(dict(pretrained.config)).to(_dtype(config))
        network, loaded = cls.from_pretrained(
            pretrained.folder,
            dtype=_dtype(config),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise InputError(f"{pretrained.name}: diffusers cannot load it: {error}") from error
    refuse_misread(f"model.pretrained {pretrained.name}", network, loaded)
    return network


def _dtype(config: ModelConfig) -> torch.dtype:
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    frozen = config.train in _FROZEN and torch.cuda.is_available()
    return torch.bfloat16 if frozen else torch.float32


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist."""
    try:
        document = read_json(file, follow=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{file} holds {type(document).__name__}; expected an object")
    return document
