"""Layers that are stored exactly beside a codec with loss."""

from typing import Literal

from ...schemas import Codec, FeatureIdentity, InputError
from ..codecs.registry import is_lossy
from ..text.presets import PRESETS


def choose_exact_layers(
    asked: str | None, codec: str, identity: FeatureIdentity, existing: Codec | None = None
) -> list[int]:
    """Numbers of the layers of a store that are also stored exactly, ascending.

    Args:
        asked: ``base``: those that the preset's pipeline reads. ``none``, or numbers. None: as the
            existing store has it; for a new one base, where the codec has loss and the pipeline
            reads some layers only.
        codec: of the store.
        identity: of the store.
        existing: codec of the existing store.

    Raises:
        InputError: there is no such base, or a layer is not stored.
    """
    if asked is None and existing is not None:
        return list(existing.exact_layers) if is_lossy(codec) else []
    if identity.mixes is not None and asked not in (None, "none"):
        raise InputError(f"--exact-layers {asked}: the store holds mixes of layers, not layers")
    if identity.mixes is not None or asked == "none":
        return []
    if asked in (None, "base"):
        return _base(asked, codec, identity)
    return _numbers(str(asked), identity)


def _base(asked: str | None, codec: str, identity: FeatureIdentity) -> list[int]:
    processing, model, stored = identity.template.processing, identity.model, identity.layers
    preset = None if processing is None else PRESETS.get(processing.preset)
    if asked is None:
        if preset is None or preset.reads_all != "no" or not is_lossy(codec):
            return []
        return sorted({*preset.base_layers(model.num_layers)} & {*stored})
    if preset is None:
        raise InputError(
            "--exact-layers base: the template is no preset of a pipeline; give the numbers of the "
            "layers that your network reads"
        )
    base = sorted(preset.base_layers(model.num_layers))
    if preset.reads_all != "no":
        raise InputError(
            "--exact-layers base: the pipeline reads all layers; with --codec lossless or bf16 all "
            "are exact"
        )
    if not base or {*base} - {*stored}:
        raise InputError(
            f"--exact-layers base: the pipeline reads layers {_list(base or preset.base)}; "
            f"to be stored are {_list(stored)} of an LLM of {model.num_layers}"
        )
    return base


def _numbers(asked: str, identity: FeatureIdentity) -> list[int]:
    from ..models.llm import parse_layers

    has_raw = identity.final_norm in ("raw", "both")
    final_norm: Literal["both", "normed"] = "both" if has_raw else "normed"
    exact = parse_layers(asked, identity.model.num_layers, final_norm, option="--exact-layers")
    if missing := sorted({*exact} - {*identity.layers}):
        raise InputError(
            f"--exact-layers {asked}: layers {_list(missing)} are not to be stored; expected some "
            f"of {_list(identity.layers)}"
        )
    if exact == identity.layers:
        raise InputError(
            f"--exact-layers {asked} are all that are stored; with --codec lossless or bf16 all "
            "are exact"
        )
    return exact


def _list(layers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))
