"""``semroute.attach``: a pipeline of diffusers that reads what a run learned."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ...pipeline.models.hub import hash_file
from ...pipeline.models.llm import find_tower
from ...schemas import InputError, PretrainedIdentity, RunRecord, differences, refuse_differences
from ..adapters.arguments import ARGUMENTS
from ..adapters.captures import Captures
from ..adapters.families import find_family
from ..adapters.lora import is_lora
from ..adapters.pipeline import Attachment, replace_weights, restore
from ..adapters.routed import PARTS
from ..runs.adapter import load_adapter
from ..runs.record import adapt, refuse_other_weights

_PLACE = "_semroute_attachment"
_NETWORK = "transformer."


def attach(
    pipe: Any,
    run: str | os.PathLike[str],
    weights: Literal["ema", "model"] | None = None,
    step: int | None = None,
    *,
    check: bool = True,
) -> Any:
    """Let a pipeline of diffusers read what a run learned; it is called as before.

    Prompts, negative prompts, several images per prompt, offloading and other dtypes work as they
    do without. Attach before ``torch.compile``, and before loading LoRA of others if the run
    trained LoRA or weights of the network.

    Args:
        pipe: a pipeline with the transformer that the run adapted.
        run: the run directory, or a folder that semroute export --as pipeline wrote.
        weights: the exponential moving average, which is the default, or the weights themselves.
        step: step of the checkpoint. Default: the newest.
        check: compare the files that the transformer was loaded from with those of the run.

    Returns:
        The same pipeline.

    Raises:
        InputError: the run trained a network of its own; or the pipeline has another transformer,
            other weights, another text encoder, or is attached to a run already.
    """
    adapter = load_adapter(run, step, weights)
    path, record, values = adapter.path, adapter.record, adapter.trained
    assert record.pretrained is not None
    changes = any(name.startswith(_NETWORK) for name in values)
    reads_text = not PARTS[record.config.model.train].isdisjoint({"gain", "router"})
    _check_network(pipe, record, record.pretrained, path)
    if changes:
        _check_unchanged(pipe.transformer)
    if check:
        _check_files(pipe.transformer, record.pretrained, path)
    if reads_text:
        _check_encoder(pipe, record, path)
    transformer = pipe.transformer
    trained = frozenset(n for n, p in transformer.named_parameters() if p.requires_grad)
    with _weights_in_place(pipe, changes):
        routed = adapt(record, transformer, trainable=False)
        own = dict(routed.named_parameters())
        expected = {
            name: value
            for name, value in own.items()
            if name in values or is_lora(name) or not name.startswith(_NETWORK)
        }
        try:
            refuse_other_weights(values, expected)
        except InputError:
            restore(routed, {}, trained)
            raise
        replaced = replace_weights(routed, values)
    routed.requires_grad_(False)
    captures = Captures(routed.router.layers_read, routed.base_layers)
    if reads_text:
        names = ARGUMENTS[routed.family.name]
        encoder = getattr(pipe, names.encoder)
        captures.watch(
            encoder,
            find_tower(encoder, names.encoder),
            record.features.model.num_layers,
            getattr(pipe, names.tokenizer).pad_token_id,
        )
    published = {
        name.removeprefix(_NETWORK): value
        for name, value in replaced.items()
        if name.startswith(_NETWORK) and not is_lora(name)
    }
    setattr(transformer, _PLACE, Attachment(routed, captures, published, trained))
    return pipe


def detach(pipe: Any) -> Any:
    """Give a pipeline back as it was before :func:`attach`.

    Returns:
        The same pipeline.

    Raises:
        InputError: nothing is attached to it.
    """
    attachment = getattr(getattr(pipe, "transformer", None), _PLACE, None)
    if attachment is None:
        raise InputError(f"no run is attached to this {type(pipe).__name__}")
    with _weights_in_place(pipe, attachment.changes_network):
        attachment.remove()
    delattr(attachment.routed.transformer, _PLACE)
    return pipe


@contextmanager
def _weights_in_place(pipe: Any, changes: bool) -> Iterator[None]:
    """A context in which weights can be changed: sequential offloading is off."""
    if not (changes and any(p.is_meta for p in pipe.transformer.parameters())):
        yield
        return
    device = getattr(pipe, "_offload_device", None)
    if device is None:
        raise InputError(
            "weights of the transformer are not in memory, and the run changes some of them: load "
            "the pipeline without a device_map that offloads, or use enable_model_cpu_offload"
        )
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        pipe.enable_sequential_cpu_offload(device=device)


def _check_network(
    pipe: Any, record: RunRecord, pretrained: PretrainedIdentity, path: Path
) -> None:
    """Refuse a pipeline with another transformer than the run's, or one that cannot be changed."""
    kind, transformer = type(pipe).__name__, getattr(pipe, "transformer", None)
    wanted = f"{path} adapted a {pretrained.transformer}"
    if transformer is None:
        raise InputError(f"{kind} has no transformer, but {wanted}")
    if hasattr(transformer, "_orig_mod"):
        raise InputError("the transformer is compiled already: attach before torch.compile")
    if hasattr(transformer, _PLACE):
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


def _check_unchanged(transformer: Any) -> None:
    """Refuse a transformer that has LoRA of others, among which weights would be looked for."""
    if adapters := getattr(transformer, "peft_config", None):
        raise InputError(
            f"the transformer has LoRA of others ({', '.join(adapters)}), and the run changes its "
            "weights: call pipe.unload_lora_weights(), attach, and load the LoRA again"
        )


def _check_files(transformer: Any, pretrained: PretrainedIdentity, path: Path) -> None:
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


def _check_encoder(pipe: Any, record: RunRecord, path: Path) -> None:
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
