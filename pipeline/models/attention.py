"""Keys and values of an LLM's blocks: their weights, copied from it, and the shapes of these.

A block's keys and values are its input norm and its projections, applied to the hidden states that
enter it; keys may be normed per head, and have rotary positions. So is it in the families that are
known here, and for text alone, which has one position per token in all of them.

Shapes: K layers, H text width, G key/value heads, E head width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...schemas import FeatureIdentity, InputError, LlmAttention, differences, refuse_differences
from .hub import find_model
from .llm import Encoder, TextTower, describe_model, tower_without_weights
from .rope import depends_on_length

if TYPE_CHECKING:
    from torch import Tensor

    from .hub import ModelFiles

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_vl_text", "gemma3_text"),
)  # fmt: skip
"""Model types whose keys and values can be computed from stored hidden states."""
_SHIFTED_NORMS = ("gemma3_text",)
"""Model types whose norms multiply by 1 + weight."""


def find_attention(
    identity: FeatureIdentity, layers: Sequence[int], model: str
) -> tuple["ModelFiles", LlmAttention]:
    """The LLM of features, and the shapes of the keys and values of its blocks. No weights are
    loaded.

    Args:
        identity: of the features.
        layers: stored layers, ascending; layer l enters block l + 1.
        model: where the LLM is, see :func:`.hub.find_model`.

    Raises:
        InputError: no model there, or not that of the features; or its keys and values are not
            functions of stored hidden states: another family, rotary positions that depend on the
            length of a text, layers in random order, or a preset's text, whose tokens have no
            known positions.
    """
    _check_features(identity)
    source = find_model(model, "routing.llm")
    refuse_differences(
        differences({"model": describe_model(source)}, {"model": identity.model}),
        f"{model} is not the LLM of the features",
        "Name that one in routing.llm.",
    )
    tower = tower_without_weights(source)
    config, block = tower.module.config, _block(tower, 0)
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{source.name} is of family {config.model_type}, whose keys and values strategy "
            f"deep-fusion does not know; expected one of {', '.join(FAMILIES)}"
        )
    rope = tower.module.rotary_emb
    attention = block.self_attn
    if depends_on_length(rope):
        raise InputError(
            f"{source.name} has rotary positions that depend on the length of a text, which "
            "deep-fusion cannot copy: choose another strategy or LLM"
        )
    width = int(attention.head_dim)
    if (rotated := 2 * len(_frequencies(tower, layers[0])[0])) != width:
        raise InputError(
            f"{source.name} rotates {rotated} of {width} channels of a head; deep-fusion expects "
            "all: choose another strategy or LLM"
        )
    template = identity.template
    return source, LlmAttention(
        layers=list(layers),
        num_heads=attention.q_proj.out_features // width,
        num_kv_heads=attention.k_proj.out_features // width,
        head_dim=width,
        eps=_eps(block.input_layernorm),
        bias=attention.k_proj.bias is not None,
        key_norm=hasattr(attention, "k_norm"),
        first_position=0 if template.keep_prefix else len(template.prefix_tokens),
    )


def _check_features(identity: FeatureIdentity) -> None:
    if identity.shuffled is not None:
        raise InputError(
            "the features hold layers in random order, a control, but each block of the LLM reads "
            "its own layer: train deep-fusion on features that are not shuffled"
        )
    processing = identity.template.processing
    if processing is not None:
        raise InputError(
            f"the features were extracted with preset {processing.preset}, which drops and pads "
            "tokens: deep-fusion needs the position of each, so extract with a --template"
        )


def read_attention(
    source: "ModelFiles", attention: LlmAttention, identity: FeatureIdentity
) -> dict[str, "Tensor"]:
    """Weights of the keys and values of the LLM's blocks, as
    :class:`semroute.trainer.model.deep_fusion.DeepFusion` names them.

    The LLM is loaded for it, on the CPU, in the dtype in which the features were extracted.

    Returns:
        ``norm`` [K, H]; ``weight`` [K, 2*G*E, H], keys first; ``bias`` [K, 2*G*E] and ``key_norm``
        [K, E] where the LLM has them; ``frequencies`` [K, E/2] of the rotary positions, and
        ``scale`` [K, 1] of their sines and cosines.
    """
    import torch

    last = max(attention.layers) + 1
    tower = Encoder(source, [last], identity.dtype, "cpu").tower
    blocks = [_block(tower, layer) for layer in attention.layers]
    shift = float(tower.module.config.model_type in _SHIFTED_NORMS)
    projections = [(block.self_attn.k_proj, block.self_attn.v_proj) for block in blocks]
    rotary = [_frequencies(tower, layer) for layer in attention.layers]
    weights = {
        "norm": torch.stack([shift + block.input_layernorm.weight.float() for block in blocks]),
        "weight": torch.stack([torch.cat([k.weight, v.weight]) for k, v in projections]),
        "frequencies": torch.stack([frequencies.float() for frequencies, _ in rotary]),
        "scale": torch.tensor([[scale] for _, scale in rotary]),
    }
    if attention.bias:
        weights["bias"] = torch.stack([torch.cat([k.bias, v.bias]) for k, v in projections])
    if attention.key_norm:
        norms = [block.self_attn.k_norm.weight.float() for block in blocks]
        weights["key_norm"] = torch.stack([shift + norm for norm in norms])
    return {name: value.contiguous() for name, value in weights.items()}


def _frequencies(tower: TextTower, layer: int) -> tuple["Tensor", float]:
    """Frequencies of the rotary positions in the block that a layer enters, and their scale."""
    rope, prefix = tower.module.rotary_emb, ""
    if isinstance(rope.rope_type, dict):  # Gemma 3: one for each kind of attention
        prefix = f"{tower.module.config.layer_types[layer]}_"
    return getattr(rope, f"{prefix}inv_freq"), float(getattr(rope, f"{prefix}attention_scaling"))


def _block(tower: TextTower, number: int) -> Any:
    return tower.blocks[number]


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
