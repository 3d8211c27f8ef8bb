"""Where text and t are in what a pipeline gives its network, as a table.

It is the inverse of :attr:`.base.Family.call`: from the arguments of the network's ``forward`` to
rows of text and semroute's t. Names and values are those of the pipelines in diffusers 0.42.

Shapes: B batch, T text rows, K base layers that the network reads (taps), H text width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .networks import CLIP_ROWS, FLUX2_TAPS, IDEOGRAM4_TAPS

Config = Mapping[str, Any]
_PROMPT = ("prompt_embeds", "negative_prompt_embeds")
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


def _one_layer(value: Tensor, _config: Config) -> Tensor:
    return value[:, :, None]


def _write_one_layer(_value: Tensor, rows: Tensor) -> Tensor:
    return rows[:, :, 0]


@dataclass(frozen=True)
class Arguments:
    """Arguments of the networks of one family.

    Attributes:
        text: of the network's ``forward``: text.
        read: (its value, configuration of the transformer) -> the rows that routing may change,
            [B, T, K, H].
        write: (its value, other rows [B, T, K, H]) -> the value with these rows.
        timestep: of the network's ``forward``: the noise level.
        read_t: (its value, configuration of the transformer) -> t, [B].
        encoder: component of the pipeline that is the LLM.
        embeds: argument of the pipeline that holds its rows; "": it takes none.
        axis: axis of the batch in it.
        encoded: what ``encode_prompt`` returns, in order, as arguments of the pipeline; None: not
            one.
    """

    text: str = "encoder_hidden_states"
    read: Callable[[Any, Config], Tensor] = _one_layer
    write: Callable[[Any, Tensor], Any] = _write_one_layer
    timestep: str = "timestep"
    read_t: Callable[[Tensor, Config], Tensor] = lambda value, _config: value
    encoder: str = "text_encoder"
    embeds: str = "prompt_embeds"
    axis: int = 0
    encoded: tuple[str | None, ...] = _PROMPT

    @property
    def tokenizer(self) -> str:
        """Component of the pipeline that is the tokenizer of the LLM."""
        return self.encoder.replace("text_encoder", "tokenizer")


def _thousandth(value: Tensor, _config: Config) -> Tensor:
    return value / 1000


def _reversed(value: Tensor, _config: Config) -> Tensor:
    return 1 - value


def _wan_t(value: Tensor, _config: Config) -> Tensor:
    """Wan 2.2 5B tells each token its own t, of which those of an image that is given are 0."""
    return value.flatten(1).amax(1) / 1000 if value.ndim > 1 else value / 1000


def _behind_clip(value: Tensor, _config: Config) -> Tensor:
    return value[:, CLIP_ROWS:, None]


def _write_behind_clip(value: Tensor, rows: Tensor) -> Tensor:
    return torch.cat([value[:, :CLIP_ROWS], rows[:, :, 0]], dim=1)


def _captions(value: list[Tensor], _config: Config) -> Tensor:
    return pad_sequence([*value], batch_first=True)[:, :, None]


def _write_captions(value: list[Tensor], rows: Tensor) -> list[Tensor]:
    return [new[: len(old), 0] for old, new in zip(value, rows, strict=True)]


def _llama_layers(value: Any, config: Config) -> Tensor:
    return torch.stack([value[layer] for layer in sorted({*config["llama_layers"]})], dim=2)


def _keep(value: Any, _rows: Tensor) -> Any:
    return value  # the sockets of HiDream and FIBO are projections behind this argument


ARGUMENTS = {
    "pixart": Arguments(read_t=lambda step, _config: (step + 1) / 1000, encoded=_MASKED),
    "sana": Arguments(
        read_t=lambda value, config: value / (1000 * config["timestep_scale"]), encoded=_MASKED
    ),
    "wan": Arguments(read_t=_wan_t),
    "sd3": Arguments(
        read=_behind_clip,
        write=_write_behind_clip,
        read_t=_thousandth,
        encoder="text_encoder_3",
        encoded=(*_PROMPT, "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    ),
    "qwen-image": Arguments(encoded=("prompt_embeds", "prompt_embeds_mask")),
    "auraflow": Arguments(encoded=_MASKED),
    "flux2": Arguments(
        read=lambda value, _config: value.unflatten(2, (FLUX2_TAPS, -1)),
        write=lambda _value, rows: rows.flatten(2),
        encoded=("prompt_embeds", None),
    ),
    "lumina2": Arguments(read_t=_reversed, encoded=_MASKED),
    "z-image": Arguments(
        text="cap_feats",
        read=_captions,
        write=_write_captions,
        timestep="t",
        read_t=_reversed,
    ),
    "krea2": Arguments(
        read=lambda value, _config: value,
        write=lambda _value, rows: rows,
        encoded=("prompt_embeds", "prompt_embeds_mask"),
    ),
    "ideogram4": Arguments(
        read=lambda value, _config: value.unflatten(2, (-1, IDEOGRAM4_TAPS)).mT,
        write=lambda _value, rows: rows.mT.flatten(2),
        read_t=_reversed,
        encoded=("prompt_embeds", None, None, None),
    ),
    "hidream": Arguments(
        text="encoder_hidden_states_llama3",
        read=_llama_layers,
        write=_keep,
        timestep="timesteps",
        read_t=_thousandth,
        encoder="text_encoder_4",
        embeds="prompt_embeds_llama3",
        axis=1,
        encoded=(
            "prompt_embeds_t5",
            "negative_prompt_embeds_t5",
            "prompt_embeds_llama3",
            "negative_prompt_embeds_llama3",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
    ),
    "fibo": Arguments(
        text="text_encoder_layers",
        read=lambda value, _config: torch.stack([*value], dim=2),
        write=_keep,
        read_t=_thousandth,
        embeds="",
        encoded=(None, None, None, None, None, "prompt_layers", "negative_prompt_layers"),
    ),
}
"""By name of the family."""

TEXT_ONLY = {"ltx2": Arguments(encoded=_MASKED), "cosmos": Arguments()}
"""The same of pipelines whose networks are not routed; ``embed`` encodes prompts for them."""
