"""LoRA of a pretrained transformer as files that diffusers, or peft, loads by itself.

``pytorch_lora_weights.safetensors`` is what ``load_lora_weights`` of a pipeline takes;
``adapter_model.safetensors`` and ``adapter_config.json`` what ``PeftModel.from_pretrained`` takes,
for pipelines that load no LoRA (PixArt). The scale of LoRA, alpha / r, is part of the second
matrix, so that a program which reads no alpha applies the same change.

Shapes: r rank, I inputs, O outputs of a linear layer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from ...schemas import InputError, LoraConfig, PretrainedIdentity
from ...schemas.tensor_files import load_tensors, make_readable, save_tensors
from .families import find_family
from .lora import ADAPTER
from .pretrained import find_class

Matrices: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Name of a linear layer in the transformer -> A [r, I] and B [O, r]; B A is added to it."""
PIPELINE_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PIPELINE, _PEFT = "transformer.", "base_model.model."
_A, _B = ".lora_A", ".lora_B"


def matrices_of(weights: Mapping[str, Tensor], config: LoraConfig) -> Matrices:
    """LoRA among the weights of a :class:`.routed.Routed`; empty without."""
    scale = (config.alpha or config.rank) / config.rank
    found = {}
    for name, first in weights.items():
        layer, part, rest = name.partition(f"{_A}.{ADAPTER}.weight")
        if part and not rest:
            second = weights[f"{layer}{_B}.{ADAPTER}.weight"].float() * scale
            found[layer.removeprefix(_PIPELINE)] = (first.float(), second)
    return found


def weights_of(matrices: Matrices, config: LoraConfig) -> dict[str, Tensor]:
    """The inverse of :func:`matrices_of`."""
    scale = (config.alpha or config.rank) / config.rank
    weights = {}
    for layer, (first, second) in matrices.items():
        weights[f"{_PIPELINE}{layer}{_A}.{ADAPTER}.weight"] = first
        weights[f"{_PIPELINE}{layer}{_B}.{ADAPTER}.weight"] = second / scale
    return weights


def find_loader(identity: PretrainedIdentity) -> Any:
    """The class of pipelines of diffusers that loads LoRA of a transformer; None: there is none.

    Raises:
        InputError: diffusers is not installed, or lacks a class of pipelines of this family.
    """
    family = find_family(identity.transformer, identity.transformer)
    for name in sorted(family.pipelines, key=lambda name: name != identity.pipeline):
        cls = find_class(name)
        if hasattr(cls, "save_lora_weights"):
            return cls
    return None


def write_lora(folder: Path, matrices: Matrices, loader: Any, base: str | None) -> None:
    """Write LoRA into a folder, in the format of diffusers or of peft.

    Args:
        loader: what :func:`find_loader` returns.
        base: name of the base model on the Hub, if it has one; peft's configuration holds it.

    Raises:
        InputError: peft is not installed.
    """
    rank = next(iter(matrices.values()))[0].shape[0]
    prefix = "" if loader else _PEFT
    tensors = {
        f"{prefix}{layer}{part}.weight": matrix.contiguous()
        for layer, pair in matrices.items()
        for part, matrix in zip((_A, _B), pair, strict=True)
    }
    if loader:
        settings = {"r": rank, "lora_alpha": rank, "target_modules": [*matrices]}
        loader.save_lora_weights(
            folder,
            transformer_lora_layers=tensors,
            transformer_lora_adapter_metadata=settings,
        )
        make_readable(folder)
        return
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InputError(f"LoRA needs peft ({error}): pip install 'semroute[adapters]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[*matrices],
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_tensors(tensors, folder / PEFT_FILE, {"format": "pt"})


def read_lora(folder: Path) -> Matrices:
    """What :func:`write_lora` wrote; empty if the folder holds none.

    Raises:
        InputError: a file is damaged.
    """
    for file, prefix in ((folder / PIPELINE_FILE, _PIPELINE), (folder / PEFT_FILE, _PEFT)):
        if not file.exists():
            continue
        try:
            tensors = load_tensors(file)
            ends = (f"{_A}.weight", f"{_B}.weight")
            layers = [
                name.removesuffix(ends[0]).removeprefix(prefix)
                for name in tensors
                if name.endswith(ends[0])
            ]
            found = {}
            for layer in layers:
                first, second = (tensors[f"{prefix}{layer}{end}"] for end in ends)
                found[layer] = (first, second)
        except (OSError, KeyError) as error:
            raise InputError(f"{file} is damaged: {error}") from error
        return found
    return {}
