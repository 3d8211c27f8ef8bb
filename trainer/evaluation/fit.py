"""Whether a pipeline of diffusers fits a run: one message for each way in which it does not."""

import json
from pathlib import Path
from typing import Any

from ...pipeline.models.hub import hash_file
from ...pipeline.models.llm import find_tower
from ...schemas import (
    EmbedsRecord,
    InputError,
    PretrainedIdentity,
    RunRecord,
    differences,
    refuse_differences,
)
from ..adapters.arguments import ARGUMENTS
from ..adapters.families import find_family
from ..runs.adapter import Adapter

PLACE = "_semroute_attachment"
"""Attribute of a transformer that a run is attached to."""


def check_network(pipe: Any, record: RunRecord, pretrained: PretrainedIdentity, path: Path) -> None:
    """Refuse a pipeline with another transformer than the run's, or one that cannot be changed."""
    kind, transformer = type(pipe).__name__, getattr(pipe, "transformer", None)
    wanted = f"{path} adapted a {pretrained.transformer}"
    if transformer is None:
        raise InputError(f"{kind} has no transformer, but {wanted}")
    if hasattr(transformer, "_orig_mod"):
        raise InputError("the transformer is compiled already: attach before torch.compile")
    if hasattr(transformer, PLACE):
        raise InputError(f"a run is attached to this {kind} already: call semroute.detach first")
    family = find_family(type(transformer).__name__, kind)
    if type(transformer).__name__ != pretrained.transformer:
        raise InputError(f"{kind} has a {type(transformer).__name__}, but {wanted}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise InputError(f"{kind} has two transformers, but {wanted}, and one alone")
    config = json.loads(json.dumps(dict(transformer.config), default=str))
    common = {key for key in {*config} & {*pretrained.config} if not key.startswith("_")}
    refuse_differences(
        differences(
            {key: config[key] for key in common}, {key: pretrained.config[key] for key in common}
        ),
        f"the transformer of {kind} is not that of {path}; found, against the run's own",
        f"Load {record.config.model.pretrained}.",
    )
    index = {**pipe.config, "_class_name": kind}
    layers = family.base_layers(record.features.model.num_layers, index, config)
    if record.config.model.base_layers is None and layers != pretrained.base_layers:
        raise InputError(
            f"{kind} reads layers {layers} of its text encoder, but {path} was trained for a "
            f"pipeline that reads layers {pretrained.base_layers}"
        )


def check_unchanged(transformer: Any) -> None:
    """Refuse a transformer that has LoRA of others, among which weights would be looked for."""
    if adapters := getattr(transformer, "peft_config", None):
        raise InputError(
            f"the transformer has LoRA of others ({', '.join(adapters)}), and the run changes its "
            "weights: call pipe.unload_lora_weights(), attach, and load the LoRA again"
        )


def check_files(transformer: Any, pretrained: PretrainedIdentity, path: Path) -> None:
    """Refuse weights of other files than those of the run."""
    folder = Path(str(transformer.config.get("_name_or_path", "")))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("transformer/*.safetensors"))
    if not files:
        raise InputError(
            f"where the weights of this {pretrained.transformer} came from is not known, so that "
            f"they cannot be compared with those that {path} adapted: pass check=False if they are "
            "the same"
        )
    own = {name: value for name, value in pretrained.files.items() if name.endswith(".safetensors")}
    refuse_differences(
        differences({file.name: hash_file(file) for file in files}, own),
        f"the weights in {folder} are not those that {path} adapted; found, against the run's own",
        "Load the pipeline that the run was trained on, or pass check=False.",
    )


def check_encoder(pipe: Any, record: RunRecord, path: Path) -> None:
    """Refuse a text encoder that is not the LLM of the run's features, or lacks its layers."""
    assert record.pretrained is not None
    name = ARGUMENTS[record.pretrained.family].encoder
    encoder, llm = getattr(pipe, name, None), record.features.model
    if encoder is None:
        raise InputError(
            f"this {type(pipe).__name__} has no {name}, whose layers {path} weighs: load it, or "
            "encode prompts elsewhere with semroute embed, and pass their file as embeds"
        )
    tower = find_tower(encoder, name)
    num_layers = len(tower.blocks)
    found = {
        "architecture": tower.module.config.model_type,
        "width": tower.module.config.hidden_size,
        "num_layers": num_layers,
    }
    needed = min(max(record.features.layers), llm.num_layers)
    if needed <= num_layers < llm.num_layers:  # last blocks that nobody reads may be missing
        found["num_layers"] = llm.num_layers
    refuse_differences(
        differences(found, {key: getattr(llm, key) for key in found}),
        f"{name} of this {type(pipe).__name__} is not the LLM of {path}; found, against the run's",
        f"Load {record.config.model.pretrained}.",
    )


def check_embeds(record: EmbedsRecord, adapter: Adapter, changes: bool) -> None:
    """Refuse embeddings that were made for another pipeline or run, or that need no run.

    Args:
        changes: the run changes weights of the transformer.
    """
    if record.learned != "layers" and not changes:
        raise InputError(
            f"the embeddings hold all that {adapter.path} learned: pass them to the pipeline as "
            "they are, without semroute.attach"
        )
    found = {"model": record.model.model_dump(), "base_layers": record.base_layers}
    own = {
        "model": adapter.record.features.model.model_dump(),
        "base_layers": adapter.identity.base_layers,
    }
    if record.learned == "layers":
        found["layers"], own["layers"] = record.layers, [*adapter.router.layers_read]
    refuse_differences(
        differences(found, own),
        f"the embeddings are not for {adapter.path}; found, against the run's own",
        f"Encode the prompts with semroute embed {adapter.path}.",
    )
