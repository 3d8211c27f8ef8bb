"""How the pipelines of diffusers read text, as a table: their LLM, its layers, rows and padding.

Shapes: B captions, T rows, K base layers (those that the transformer reads), H text width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ...schemas import MASK, InputError

if TYPE_CHECKING:
    import torch

Encoded = dict[str, "torch.Tensor"]
NEGATIVE = "negative_"
_KREA2_LAYERS = tuple(range(2, 36, 3))  # where model_index.json names none


@dataclass(frozen=True)
class TextRecipe:
    """The text half of one class of pipelines.

    Attributes:
        family: name of the family, also of the preset that extracts its features.
        pipeline: class in diffusers.
        outputs: names of what ``encode_prompt`` returns, in order. Names that begin with
            ``negative_`` are of the negative prompt; None: not what the transformer is given.
        layers: (number of LLM layers, ``model_index.json``) -> base layers, in the order of taps.
        rows: the output that holds rows of the base layers.
        order: how K layers lie in a row: ``side by side`` [K * H], ``interleaved`` [H * K] or
            ``stacked`` [K, H].
        encoder: component that holds the LLM of the base layers.
        reads_padding: whether the transformer reads rows that are not the caption's own, other than
            zeros.
        final_norm: whether the last layer, where it is a base layer, is taken after the final norm
            or before it.
        standardized: whether each row of a layer has mean 0 and deviation 1.
        arguments: of ``encode_prompt``, besides the defaults of ``__call__``.
        arrange: brings outputs into the shape of all: captions first, ``mask`` ``[B, T]``.
        needs_networks: whether the pipeline's constructor asks for other networks.
        tapped: method of the pipeline that runs the LLM, where that is not the LLM's ``forward``.
        cleaners: optional packages with which the pipeline cleans captions if they are installed.
    """

    family: str
    pipeline: str
    outputs: tuple[str | None, ...]
    layers: Callable[[int, Mapping[str, Any]], Sequence[int]]
    rows: str = "prompt_embeds"
    order: Literal["side by side", "interleaved", "stacked"] = "side by side"
    encoder: str = "text_encoder"
    reads_padding: bool = False
    final_norm: Literal["normed", "raw"] = "normed"
    standardized: bool = False
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    arrange: Callable[[dict[str, Any]], Encoded] = dict
    needs_networks: bool = False
    tapped: str | None = None
    cleaners: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the LLM."""
        return self.encoder.replace("text_encoder", "tokenizer")

    @property
    def has_negative(self) -> bool:
        """Whether ``encode_prompt`` encodes the negative prompt too."""
        return any(name is not None and name.startswith(NEGATIVE) for name in self.outputs)

    def view(self, rows: "torch.Tensor", num_layers: int) -> "torch.Tensor":
        """Rows of :attr:`rows` as ``[T, K, H]``.

        Args:
            rows: ``[T, ...]``.
            num_layers: K.
        """
        if self.order == "side by side":
            return rows.unflatten(-1, (num_layers, -1))
        if self.order == "interleaved":
            return rows.unflatten(-1, (-1, num_layers)).transpose(-1, -2)
        return rows


def find_recipe(pipeline_class: Any, name: str, option: str = "--pipeline") -> TextRecipe:
    """The recipe of a class of pipelines.

    Args:
        pipeline_class: as ``model_index.json`` has it.
        name: of the pipeline, and option: of the command line, for the message.

    Raises:
        InputError: no such class in the table.
    """
    if isinstance(pipeline_class, str) and pipeline_class in RECIPES:
        return RECIPES[pipeline_class]
    raise InputError(
        f"{option} {name}: its class is {pipeline_class}; expected one of {', '.join(RECIPES)}"
    )


def _last(num_layers: int, _index: Mapping[str, Any]) -> list[int]:
    return [num_layers]


def _last_but_one(num_layers: int, _index: Mapping[str, Any]) -> list[int]:
    return [num_layers - 1]


def _blocks(num_layers: int, _index: Mapping[str, Any]) -> list[int]:
    return [*range(1, num_layers + 1)]


def _with_embedding(num_layers: int, _index: Mapping[str, Any]) -> list[int]:
    return [*range(num_layers + 1)]


def _these(*layers: int) -> Callable[[int, Mapping[str, Any]], list[int]]:
    return lambda _num_layers, _index: [*layers]


def _selected(_num_layers: int, index: Mapping[str, Any]) -> list[int]:
    return [*(index.get("text_encoder_select_layers") or _KREA2_LAYERS)]


def _ideogram4_layers(_num_layers: int, _index: Mapping[str, Any]) -> list[int]:
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

    return [block + 1 for block in QWEN3_VL_ACTIVATION_LAYERS]  # numbers of blocks, from 0


def _from_list(outputs: dict[str, Any]) -> Encoded:
    """Z-Image: a list of one caption's rows."""
    (rows,) = outputs["prompt_embeds"]
    return {"prompt_embeds": rows[None], MASK: rows.new_ones(1, len(rows)).bool()}


def _one_value_per_row(outputs: dict[str, Any]) -> Encoded:
    """AuraFlow: the mask comes as ``[B, T * H]``."""
    width = outputs["prompt_embeds"].shape[-1]
    return {**outputs, MASK: outputs[MASK].unflatten(-1, (-1, width))[..., 0]}


def _captions_first(outputs: dict[str, Any]) -> Encoded:
    """HiDream: the LLM's layers come as ``[L, B, T, H]``."""
    layers = outputs["prompt_embeds_llama3"].permute(1, 2, 0, 3)
    return {**outputs, "prompt_embeds_llama3": layers}


def _stacked_layers(outputs: dict[str, Any]) -> Encoded:
    """FIBO: the LLM's layers come as a list."""
    import torch

    return {**outputs, "prompt_layers": torch.stack(outputs["prompt_layers"], 2)}


def _text_of_sequence(outputs: dict[str, Any]) -> Encoded:
    """Ideogram 4: what each row of the joint sequence is comes as a number."""
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR

    indicator = outputs.pop("indicator")
    return {**outputs, MASK: indicator == LLM_TOKEN_INDICATOR}


_MASKED = ("prompt_embeds", MASK, f"{NEGATIVE}prompt_embeds", f"{NEGATIVE}{MASK}")
_UNMASKED = ("prompt_embeds", f"{NEGATIVE}prompt_embeds")
_TABLE = (
    TextRecipe(
        "pixart",
        "PixArtSigmaPipeline",
        _MASKED,
        _last,
        cleaners=("bs4", "ftfy"),
    ),
    TextRecipe("sana", "SanaPipeline", _MASKED, _last),
    TextRecipe("wan", "WanPipeline", _UNMASKED, _last, cleaners=("ftfy",)),
    TextRecipe("qwen-image", "QwenImagePipeline", ("prompt_embeds", MASK), _last),
    TextRecipe("lumina2", "Lumina2Pipeline", _MASKED, _last_but_one),
    TextRecipe("z-image", "ZImagePipeline", _UNMASKED, _last_but_one, arrange=_from_list),
    TextRecipe(
        "krea2",
        "Krea2Pipeline",
        ("prompt_embeds", MASK),
        _selected,
        order="stacked",
    ),
    TextRecipe(
        "flux2",
        "Flux2Pipeline",
        ("prompt_embeds", None),
        _these(10, 20, 30),
        reads_padding=True,
    ),
    TextRecipe(
        "flux2-klein",
        "Flux2KleinPipeline",
        ("prompt_embeds", None),
        _these(9, 18, 27),
        reads_padding=True,
    ),
    TextRecipe(
        "hidream",
        "HiDreamImagePipeline",
        (
            "prompt_embeds_t5",
            f"{NEGATIVE}prompt_embeds_t5",
            "prompt_embeds_llama3",
            f"{NEGATIVE}prompt_embeds_llama3",
            "pooled_prompt_embeds",
            f"{NEGATIVE}pooled_prompt_embeds",
        ),
        _blocks,
        rows="prompt_embeds_llama3",
        order="stacked",
        encoder="text_encoder_4",
        reads_padding=True,
        arrange=_captions_first,
    ),
    TextRecipe(
        "auraflow",
        "AuraFlowPipeline",
        _MASKED,
        _last,
        arrange=_one_value_per_row,
    ),
    TextRecipe(
        "sd3",
        "StableDiffusion3Pipeline",
        (*_UNMASKED, "pooled_prompt_embeds", f"{NEGATIVE}pooled_prompt_embeds"),
        _last,
        encoder="text_encoder_3",
        reads_padding=True,
    ),
    TextRecipe(
        "ideogram4",
        "Ideogram4Pipeline",
        ("prompt_embeds", None, None, "indicator"),
        _ideogram4_layers,
        order="interleaved",
        final_norm="raw",
        arguments=MappingProxyType({"grid_h": 0, "grid_w": 0}),
        arrange=_text_of_sequence,
        tapped="_get_text_encoder_hidden_states",
    ),
    TextRecipe(
        "fibo",
        "BriaFiboPipeline",
        ("prompt_embeds", None, None, MASK, None, "prompt_layers", None),
        _with_embedding,
        rows="prompt_layers",
        order="stacked",
        arguments=MappingProxyType({"guidance_scale": 1.0}),
        arrange=_stacked_layers,
    ),
    TextRecipe("ltx2", "LTX2Pipeline", _MASKED, _with_embedding, order="interleaved"),
    TextRecipe(
        "cosmos",
        "Cosmos2_5_PredictBasePipeline",
        _UNMASKED,
        _blocks,
        reads_padding=True,
        standardized=True,
        needs_networks=True,
    ),
)
RECIPES = {recipe.pipeline: recipe for recipe in _TABLE}
"""Recipe of each class of pipelines. CogView4 and Chroma are left out: what CogView4 makes of a
caption depends on the other captions of the batch, and Chroma's mask hides nothing."""
