"""LoRA of a pretrained transformer, by peft."""

from typing import Any

from ...schemas import InputError, LoraConfig
from .base import Family

ADAPTER = "default"


def add_lora(transformer: Any, config: LoraConfig, family: Family) -> None:
    """Add LoRA to linear layers of a transformer; only its matrices keep gradients.

    The second matrix starts at zero, so the network starts as it was.

    Raises:
        InputError: peft is not installed, or no layer has such a name.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InputError(f"LoRA needs peft ({error}): pip install 'semroute[adapters]'") from error
    targets = [*(config.targets or family.lora)]
    names = [name for name, _ in transformer.named_modules()]
    for target in config.targets or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(
                f"model.lora.targets: {type(transformer).__name__} has no layer {target!r}; "
                f"the default is {', '.join(family.lora)}"
            )
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]  # a factor
        target_modules=targets,
    )
    peft.inject_adapter_in_model(peft_config, transformer, ADAPTER)


def remove_lora(transformer: Any) -> None:
    """Undo :func:`add_lora`: layers without LoRA of others are those that were there."""
    from peft.tuners.lora import LoraLayer

    for name, module in [*transformer.named_modules()]:
        if not isinstance(module, LoraLayer):
            continue
        module.delete_adapter(ADAPTER)
        if not module.lora_A:
            parent, _, own = name.rpartition(".")
            setattr(transformer.get_submodule(parent), own, module.get_base_layer())
    configs = getattr(transformer, "peft_config", {})
    configs.pop(ADAPTER, None)
    if not configs:
        vars(transformer).pop("peft_config", None)


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is a matrix of LoRA."""
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
